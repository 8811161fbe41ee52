"""Time models by turns, each loaded in a process of its own that stays until all rounds are done.

Two runtimes in one process would compete for the cores with spinning threads, and share one peak of memory. Processes
that ran one after the other would each meet another load of the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from edgeq.bundle.benchmark_child import Job
from edgeq.errors import ChildDied, EdgeqError, error_of
from edgeq.evaluation import paired_times
from edgeq.evaluation.paired_times import Turns
from edgeq.records import Record
from edgeq.system.worker import Worker

_CALL_LIMIT_S = 900.0

_Name = TypeVar("_Name", bound=str)


class Latency(Record):
    """Give percentiles of the time of one run, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


class Ratio(Record):
    """Hold the median of paired ratios: the other model's time over this one's, above 1 where this one is faster."""

    against: str  # the other model
    pairs: int
    median: float
    low: float | None  # of the interval; None where the pairs are too few for one
    high: float | None
    level: float  # the probability that the interval holds the true median
    verdict: str  # in words

    def shown(self) -> str:
        """Give the ratio with its interval, and what it tells."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.median:.2f}x{interval} {self.verdict}"


@dataclass(frozen=True)
class Timed:
    """Hold what was measured of one model: its times, and the peak resident memory of its process."""

    turns: Turns
    peak_memory_bytes: int


class TimedChild:
    """Keep a model loaded in a child process, `edgeq.bundle.benchmark_child`."""

    def __init__(self, job: Job) -> None:
        """Load the model.

        Raises:
            EdgeqError: the child's, of the same kind.
            ChildDied: the child ended, as it does where memory runs out.
            TimedOut: loading took too long.
        """
        self._path = job.model
        self._where = f"{job.model}, batch {job.batch} x {job.sequence} tokens"
        self._worker = Worker(
            [sys.executable, "-m", "edgeq.bundle.benchmark_child"], self._where, time_limit_s=_CALL_LIMIT_S
        )
        try:
            self._call(do="load", job=job.model_dump_json())
        except BaseException:  # Ctrl-C, too, must leave no child
            self._worker.close()
            raise

    def __call__(self, runs: int, untimed: int) -> list[float]:
        """Give the milliseconds of each of some runs in a row, after `untimed` others.

        Raises:
            EdgeqError: the child's, of the same kind.
            ChildDied: the child ended, as it does where memory runs out.
            TimedOut: the turn took too long.
        """
        found: list[float] = self._call(do="turn", runs=runs, untimed=untimed)["milliseconds"]
        return found

    def peak_memory_bytes(self) -> int:
        """Give the peak resident memory of the process that holds the model, from its start to now.

        Raises:
            EdgeqError: the child's, or the child ended.
        """
        return int(self._call(do="memory")["peak_memory_bytes"])

    def __enter__(self) -> Self:
        """Give the child; the end of the `with` ends its process."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._worker.close()

    def _call(self, **request: object) -> dict[str, Any]:
        """Send a request, and raise the error that the child tells."""
        try:
            reply = self._worker.call(**request)
        except ChildDied as error:
            raise ChildDied(
                f"{error}\nIf memory ran out: smaller batches, fewer tokens and fewer models at once need less."
            ) from error
        if "failed" in reply:
            kind = error_of(int(reply["exit_code"])) or EdgeqError
            raise kind(reply["failed"] if self._path in reply["failed"] else f"{self._where}: {reply['failed']}")
        return reply


def timed_by_turns(
    jobs: Mapping[_Name, Job], rounds: int, warmup_rounds: int, goes_on: bool = False
) -> tuple[dict[_Name, Timed], dict[_Name, EdgeqError]]:
    """Load every model in a process of its own, and time them by turns.

    Args:
        jobs: name -> the model and its shape.
        rounds: that count; in each, every model has a turn of some runs.
        warmup_rounds: before them.
        goes_on: without a model that fails; else the first error ends all.

    Returns:
        What was measured of each model, and the error of each that failed.

    Raises:
        EdgeqError: a child's, of the same kind, unless `goes_on`.
    """
    failures = (EdgeqError,) if goes_on else ()
    with ExitStack() as stack:
        children: dict[_Name, TimedChild] = {}
        failed: dict[_Name, EdgeqError] = {}
        for name, job in jobs.items():
            try:
                children[name] = stack.enter_context(TimedChild(job))
            except failures as error:
                failed[name] = error
        times, dropped = paired_times.take_turns(children, rounds, warmup_rounds, failures)
        failed |= {name: error for name, error in dropped.items() if isinstance(error, EdgeqError)}
        found = {}
        for name, turns in times.items():
            try:
                found[name] = Timed(turns, children[name].peak_memory_bytes())
            except failures as error:
                failed[name] = error
    return found, failed


def ratio(times: Turns, other: Turns, against: str) -> Ratio:
    """Compute the median of the paired ratios of two models that took turns, with its interval.

    Args:
        times: of the model that is judged.
        other: of the model that it is compared with.
        against: the other's name.
    """
    found = paired_times.median_interval(paired_times.paired_ratios(times.rounds_ms, other.rounds_ms))
    return Ratio(
        against=against, pairs=found.size, median=found.median, low=found.low, high=found.high, level=found.level,
        verdict=paired_times.verdict(found),
    )  # fmt: skip


def percentiles(latencies_ms: tuple[float, ...]) -> Latency:
    """Give the percentiles shown to the user; each is a measured run, never interpolated below one."""
    p50, p90, p99 = (float(np.percentile(latencies_ms, q, method="higher")) for q in (50, 90, 99))
    return Latency(p50_ms=p50, p90_ms=p90, p99_ms=p99)
