"""Time models side by side: latency at batch 1, throughput in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from benchmark.figures import Blank, Figures
from benchmark.making import Made, note
from benchmark.processes import first_line
from benchmark.rows import (
    AEQ,
    FLOAT,
    GEMM,
    GEMM_OPENVINO,
    INT,
    INT16,
    LITERT_FLOAT,
    NNCF,
    OPENVINO_FLOAT,
    ORT_DYNAMIC,
    ST_ONNX,
)  # fmt: skip
from benchmark.runners import Runner
from edgeq.errors import EdgeqError
from edgeq.evaluation.paired_times import median_interval, paired_ratios, take_turns, verdict

SEQUENCES = (16, 32, 128, 256)
BATCH, BATCH_SEQUENCE = 32, 64
ROUNDS, _WARMUP_ROUNDS = 80, 6

# Time of the first over time of the second, by pairs of rounds. Below 1 the first is faster.
RATIOS = {
    "ort_of_float32": (GEMM, FLOAT),
    "ort_of_dynamic": (GEMM, ORT_DYNAMIC),
    "ort_of_sentence_transformers": (GEMM, ST_ONNX),
    "openvino_of_nncf": (GEMM_OPENVINO, NNCF),
    "openvino_of_float": (GEMM_OPENVINO, OPENVINO_FLOAT),
    "tflite_of_float": (INT, LITERT_FLOAT),
    "tflite16_of_float": (INT16, LITERT_FLOAT),
    "tflite_of_ai_edge_quantizer": (INT, AEQ),
}

Rounds = dict[str, Sequence[float] | Blank]  # row -> median of each round, in milliseconds


def latencies(made: Sequence[Made], sequences: Sequence[int] = SEQUENCES) -> Figures:
    """Time every model at batch 1."""
    found = {str(sequence): rounds_of(made, 1, sequence) for sequence in sequences}
    return {
        "models": {at: {row: summary(rounds) for row, rounds in each.items()} for at, each in found.items()},
        "ratios": {at: ratios(each) for at, each in found.items()},
    }


def throughputs(made: Sequence[Made]) -> Figures:
    """Count the texts a second in batches."""
    static = Blank("its shapes are static with batch 1")
    found = rounds_of([item for item in made if item.row.is_batched], BATCH, BATCH_SEQUENCE)
    blanks = {item.row.name: static for item in made if not item.row.is_batched}
    speeds = {name: _inverse(summary(rounds), BATCH * 1e3) for name, rounds in found.items()}
    return {"models": speeds | blanks, "ratios": {key: _turned(value) for key, value in ratios(found).items()}}


def _inverse(figure: float | Blank, over: float) -> float | Blank:
    return figure if isinstance(figure, Blank) else over / figure


def _turned(figure: Figures | Blank) -> Figures | Blank:
    """Turn a ratio of times into one of throughputs; the ends of the interval change places."""
    if isinstance(figure, Blank):
        return figure
    ends = {"low": figure["high"], "high": figure["low"], "median": figure["median"]}
    return figure | {key: None if value is None else 1.0 / value for key, value in ends.items()}


def rounds_of(made: Sequence[Made], batch: int, sequence: int) -> Rounds:
    """Time models, each in a process of its own that lives through all rounds; in a round each has one turn.

    The machine may change its speed between rounds: what is compared is compared within a pair of rounds.
    """
    note(f"timing {batch} x {sequence} tokens")
    rounds: Rounds = {}
    with ExitStack() as stack:
        runners: dict[str, Callable[[int, int], Sequence[float]]] = {}
        for item in made:
            name = item.row.name
            if item.path is None:
                rounds[name] = Blank(item.reason)
                continue
            try:
                runner = stack.enter_context(Runner(item, item.row.threads))
            except EdgeqError as error:
                rounds[name] = Blank(first_line(error))
                continue
            runners[name] = partial(runner.milliseconds, batch, sequence)
        times, failed = take_turns(runners, ROUNDS, _WARMUP_ROUNDS, (EdgeqError,))
    rounds |= {name: Blank(first_line(error)) for name, error in failed.items()}
    rounds |= {name: turns.rounds_ms for name, turns in times.items()}
    return {item.row.name: rounds[item.row.name] for item in made}


def summary(rounds: Sequence[float] | Blank) -> float | Blank:
    """Give the median of the rounds."""
    return rounds if isinstance(rounds, Blank) else float(np.median(rounds))


def ratios(rounds: Mapping[str, Sequence[float] | Blank]) -> Figures:
    """Give the median of each pair's ratios, with its interval and what it tells of the first."""
    made: Figures = {}
    for key, (first, second) in RATIOS.items():
        if first not in rounds or second not in rounds:
            continue
        numerator, denominator = rounds[first], rounds[second]
        if isinstance(numerator, Blank) or isinstance(denominator, Blank):
            made[key] = numerator if isinstance(numerator, Blank) else denominator
            continue
        found = median_interval(paired_ratios(denominator, numerator))
        told = verdict(median_interval(paired_ratios(numerator, denominator)))
        made[key] = found._asdict() | {"verdict": told}
    return made
