"""Make the parity card: the same texts through every bundle of one model, FP32 and torch, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.bundle.float_model import float_model
from edgeq.data.batches import require_texts
from edgeq.data.sessions import Embeddings
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import text_set
from edgeq.errors import ConfigError, EdgeqError, ParityFailed
from edgeq.evaluation.datasets import load_beir, load_sts
from edgeq.evaluation.parity import MIN_TEXTS
from edgeq.reports import figures, timing
from edgeq.reports.bundles import Found, collect
from edgeq.reports.chosen_texts import Chosen, choose, golden, require_enough
from edgeq.reports.codes import code_figures
from edgeq.reports.contents import Card
from edgeq.reports.layers import layers
from edgeq.reports.rows import Outcome, Times, float_row, row
from edgeq.reports.runs import FLOAT, Data, Run, run, runners
from edgeq.system.host import describe
from edgeq.system.progress import Progress
from edgeq.version import VERSION

__all__ = ["Card", "Request", "make_card"]


@dataclass(frozen=True)
class Request:
    """Hold what `edgeq compare` was asked for; the fields are the options of the verb."""

    bundles: tuple[Path, ...]
    cache: Path
    texts: Path | None = None
    column: str | None = None
    sts: Path | None = None
    retrieval: Path | None = None
    codecs: tuple[str, ...] = ()
    against: Path | None = None
    model: str | None = None
    trust_remote_code: bool | None = None
    latency: bool = False
    threads: int = 0


def make_card(request: Request, progress: Progress) -> Card:
    """Run the same texts through every runtime, and measure each against FP32 and against every other.

    The row of a runtime that cannot run on this machine is blank, with the reason.

    Args:
        request: the options.
        progress: called as `progress(stage, done, total)`.

    Raises:
        ConfigError: no bundle, bundles of different models, or texts or data sets that cannot be used.
        BundleCorrupt: a bundle is damaged.
        EdgeqError: no artifact can run on this machine; the error is the first artifact's.
    """
    # Data before models, so that a typo in a path is found at once.
    sts = None if request.sts is None else load_sts(request.sts)
    retrieval = None if request.retrieval is None else load_beir(request.retrieval)
    found = collect(request.bundles)
    for item in found:
        require_texts(
            item.manifest.float_model.inputs, item.path,
            "Measure each bundle of images with `edgeq validate BUNDLE --images FOLDER`.",
        )  # fmt: skip
    float_file = _float_file(found, request)
    chosen = golden(found) if float_file is None else choose(found, request.texts, request.column)
    require_enough(chosen, MIN_TEXTS)
    limit = min(item.token_limit for item in found)
    data = Data(chosen.texts, limit, sts, retrieval)
    runs = _run_all(found, float_file, request, data, progress)
    own = None if float_file is None else runs[0]
    reference = chosen.recorded if own is None else own.embeddings
    if reference is None:
        raise EdgeqError(f"FP32 gave no vectors: {runs[0].error}")
    outcomes = [_outcome(item, reference, chosen.texts) for item in runs if item is not own]
    _require_one(outcomes)
    times = _times(outcomes, found, float_file, request, limit, progress)
    progress("layers", 0, 1)
    tokens = Tokenizer.from_file(found[0].path / "tokenizer.json", limit).encode(chosen.texts)
    by_name = {item.name: item for item in found}
    compared = [item.compared for item in outcomes if item.compared is not None]
    card = Card(
        format=1,
        edgeq=VERSION,
        model=found[0].manifest.source.name,
        source_sha256=found[0].manifest.source.sha256,
        float_model_sha256=found[0].manifest.float_model.file.sha256,
        machine=describe(),
        texts=text_set(chosen.origin, chosen.texts, tokens),
        token_limit=limit,
        rows=(
            float_row(own, float_file, times),
            *(row(item, by_name.get(item.run.runner.name), times) for item in outcomes),
        ),
        pairs=figures.pairs([(FLOAT, reference), *((item.name, item.embeddings) for item in compared)]),
        worst_texts=figures.worst_texts(
            [item for item in compared if item.name in by_name], reference, chosen.texts, tokens
        ),
        layers=layers(found, tokens, request.cache),
        sts_pairs=None if sts is None else len(sts.scores),
        retrieval_queries=None if retrieval is None else len(retrieval.queries),
        notes=_notes(found, chosen, runs, limit, tokens.truncated),
        codes=code_figures(runs, found, data, request.codecs),
        end_to_end=tuple(dict.fromkeys(item.report.end_to_end.sentence for item in found)),
    )
    progress("layers", 1, 1)
    return card


def _float_file(found: Sequence[Found], request: Request) -> Path | None:
    """Find the float model's file; None where the golden texts with their recorded FP32 vectors serve.

    Raises:
        ConfigError: it is not found, and the user named it, or texts without recorded FP32 vectors.
    """
    try:
        return float_model(found[0].manifest, request.against, request.cache)
    except ConfigError:
        if request.against is not None or request.texts is not None:
            raise
        return None


def _run_all(
    found: Sequence[Found], float_file: Path | None, request: Request, data: Data, progress: Progress
) -> tuple[Run, ...]:
    """Run one runtime after the other: two at once would compete for the cores."""
    waiting = runners(found, float_file, request.model, request.trust_remote_code)
    runs = []
    for runner in waiting:
        progress(f"run {runner.name}", 0, 1)
        runs.append(run(runner, data))
        progress(f"run {runner.name}", 1, 1)
    return tuple(runs)


def _outcome(run: Run, reference: Embeddings, texts: Sequence[str]) -> Outcome:
    """Measure one runtime against FP32, or keep the error that prevents it."""
    if run.embeddings is None:
        return Outcome(run, None, run.error)
    try:
        return Outcome(run, figures.measured(run.runner.name, reference, run.embeddings, texts, run.invariance), None)
    except ParityFailed as error:
        return Outcome(run, None, error)


def _require_one(outcomes: Sequence[Outcome]) -> None:
    """Refuse a card on which no artifact has figures.

    Raises:
        EdgeqError: of the same class as the first artifact's, so that the exit code tells what is missing.
    """
    artifacts = [item for item in outcomes if item.run.runner.kind == "artifact"]
    blank = [(item.run.runner.name, item.error) for item in artifacts if item.error is not None]
    if len(blank) == len(artifacts):
        listed = "\n".join(f"  - {name}: {error}" for name, error in blank)
        raise type(blank[0][1])(f"none of the artifacts can be compared here:\n{listed}")


def _times(
    outcomes: Sequence[Outcome],
    found: Sequence[Found],
    float_file: Path | None,
    request: Request,
    limit: int,
    progress: Progress,
) -> Times | None:
    """Time FP32 and every artifact that ran on its device, if --latency is given."""
    if not request.latency:
        return None
    on_device = {item.run.runner.name for item in outcomes if item.compared and item.run.runner.ran_on == "device"}
    models = {} if float_file is None else {FLOAT: float_file}
    models |= {item.name: item.path for item in found if item.name in on_device}
    threads = request.threads or len(os.sched_getaffinity(0))
    return timing.run_times(models, found[0].path / "tokenizer.json", timing.lengths(limit), threads, progress)


def _notes(found: Sequence[Found], chosen: Chosen, runs: Sequence[Run], limit: int, truncated: int) -> tuple[str, ...]:
    """Give the notes on a card: what limits the figures and how far they can be compared."""
    notes = [] if chosen.note is None else [chosen.note]
    longer = [f"{item.name} ({item.token_limit})" for item in found if item.token_limit > limit]
    if longer:
        notes.append(
            f"Every runtime was given at most {limit} tokens of a text, the least that one of them takes "
            f"({truncated} of {len(chosen.texts)} texts are cut there); {', '.join(longer)} would take more."
        )
    if len({item.manifest.calibration.file.sha256 for item in found}) > 1:
        notes.append("The bundles come from different calibrations.")
    if len({(item.path / "tokenizer.json").read_bytes() for item in found}) > 1:
        notes.append("The bundles' tokenizer.json differ; each runtime was given its own tokens.")
    notes += [f"{run.runner.name}: {run.figures_error}" for run in runs if run.figures_error is not None]
    notes += [f"{item.name}: {item.report.promotion.sentence}" for item in found if item.report.promotion is not None]
    notes += [f"{item.name} missed its gate at export." for item in found if item.manifest.status == "failed"]
    return tuple(notes)
