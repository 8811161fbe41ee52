"""Make the rows of a parity card: the figures of each runtime, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeq.analysis.inspect.model_file import inspect
from edgeq.errors import EdgeqError
from edgeq.records import RunKind
from edgeq.reports.bundles import Found
from edgeq.reports.contents import BundleFacts, Row, RunTime
from edgeq.reports.figures import Measured, percentiles
from edgeq.reports.runs import FLOAT, Run

Times = Mapping[str, tuple[RunTime, ...] | str]

_RECORDED = "the FP32 model is not in the cache; the vectors that a bundle records of its golden texts stand for it"


@dataclass(frozen=True)
class Outcome:
    """Hold a run with its measures against FP32, or the error that leaves its row blank."""

    run: Run
    compared: Measured | None
    error: EdgeqError | None


def float_row(run: Run | None, file: Path | None, times: Times | None) -> Row:
    """Make the row of FP32, against which all others are measured."""
    ran_on: RunKind = "not-run" if run is None else run.runner.ran_on
    operators, operators_reason = _operators(file)
    latency, latency_reason = _latency(FLOAT, ran_on, times)
    return Row(
        name=FLOAT,
        kind="float32",
        bundle=None,
        ran_on=ran_on,
        reason=_RECORDED if run is None else None,
        size_bytes=None if file is None else file.stat().st_size,
        measures=None,
        cosine_percentiles=(),
        sts_spearman=None if run is None else run.sts_spearman,
        ndcg_at_10=None if run is None else run.ndcg_at_10,
        latency=latency,
        latency_reason=latency_reason,
        operators=operators,
        operators_reason=operators_reason,
    )


def row(outcome: Outcome, found: Found | None, times: Times | None) -> Row:
    """Make the row of an artifact, or of torch, which has no bundle."""
    run, compared = outcome.run, outcome.compared
    ran_on: RunKind = "not-run" if run.embeddings is None else run.runner.ran_on
    operators, operators_reason = _operators(None if found is None else found.path)
    latency, latency_reason = _latency(run.runner.name, ran_on, times)
    return Row(
        name=run.runner.name,
        kind=run.runner.kind,
        bundle=None if found is None else _facts(found),
        ran_on=ran_on,
        reason=None if outcome.error is None else str(outcome.error),
        size_bytes=None if found is None else sum(file.size_bytes for file in found.manifest.artifact.files),
        measures=None if compared is None else compared.measures,
        cosine_percentiles=() if compared is None else percentiles(compared.cosines),
        sts_spearman=run.sts_spearman,
        ndcg_at_10=run.ndcg_at_10,
        latency=latency,
        latency_reason=latency_reason,
        operators=operators,
        operators_reason=operators_reason,
    )


def _facts(found: Found) -> BundleFacts:
    """Copy the facts of a bundle from its records."""
    manifest = found.manifest
    return BundleFacts(
        target=manifest.target.name,
        summary=manifest.target.summary,
        backend=manifest.artifact.backend,
        scheme=manifest.target.scheme,
        status=manifest.status,
        token_limit=found.token_limit,
        qdq_sha256=manifest.qdq_model.file.sha256,
        recorded=found.report.measures,
        recorded_on=found.report.ran_on,
    )


def _latency(name: str, ran_on: RunKind, times: Times | None) -> tuple[tuple[RunTime, ...], str | None]:
    """Give a row's times, or the reason why it has none: times of another machine than the device do not count."""
    if times is None:
        return (), "not asked for: give --latency"
    if name in times:
        timed = times[name]
        return ((), timed) if isinstance(timed, str) else (timed, None)
    return (), "is not timed" if ran_on == "device" else f"{ran_on}: that says nothing of the device's time"


def _operators(path: Path | None) -> tuple[dict[str, dict[str, int]], str | None]:
    """Count a file's operators by dtype, or give the reason why it cannot be read."""
    if path is None:
        return {}, "there is no graph file"
    try:
        return inspect(path).operators, None
    except EdgeqError as error:
        return {}, str(error)
