"""Rank weight products by what their codes cost, price promoting them, and search the cheapest scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeq.backends.registry import find
from edgeq.bundle import turns
from edgeq.bundle.benchmark_child import Job
from edgeq.bundle.manifest import load_manifest
from edgeq.data.plans import plan_texts
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import token_limit
from edgeq.errors import ConfigError, ParityFailed, Unsupported
from edgeq.evaluation import paired_times
from edgeq.evaluation.paired_times import Interval
from edgeq.pipeline import export as pipeline
from edgeq.pipeline import stages
from edgeq.pipeline.request import ExportRequest
from edgeq.quantization import schemes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.quantization.sensitivity import Sensitivity, Site
from edgeq.records import Measures, Record, Scheme, Status, Target
from edgeq.system import files
from edgeq.system.host import run_kind
from edgeq.system.progress import Progress

TIMED_TOKENS, TIMED_ROUNDS, WARMUP_ROUNDS = 128, 80, 6


@dataclass(frozen=True)
class AnalysisRequest:
    """Hold the options of `edgeq analyze`."""

    export: ExportRequest  # for one target; `out` is not used
    is_costed: bool
    is_automatic: bool


class Cost(Record):
    """Hold the cost of promoting one site of a shape, measured on an artifact with all sites of it promoted."""

    channels: int
    outputs: int
    sites: int
    extra_bytes: int  # of the artifact, for each site
    extra_ms: float | None  # of one text of 128 tokens, for each site; None where the artifact does not run here
    extra_ms_interval: tuple[float, float] | None = None  # holds the true median with a probability of 99 %
    reason: str | None  # why there is no time


class Trial(Record):
    """Hold the parity and size of an artifact with some products promoted."""

    promoted: tuple[str, ...]
    status: Status
    measures: Measures | None
    size_bytes: int


class Analysis(Record):
    """Hold the analysis for one target."""

    target: str
    change: str  # what promoting does in this scheme
    sensitivity: Sensitivity
    costs: tuple[Cost, ...]
    trials: tuple[Trial, ...]
    found: Scheme | None  # the cheapest scheme found that meets the gate; None without --auto


def analyze(request: AnalysisRequest, progress: Progress) -> Analysis:
    """Measure what the codes of each product cost and, if requested, the costs and the cheapest scheme that passes.

    Args:
        request: the options.
        progress: called as `progress(stage, done, total)`.

    Raises:
        Unsupported: the target's scheme has no integer product.
        ParityFailed: automatic, and the gate does not hold with every product promoted either.
        EdgeqError: any stage of an export.
    """
    (target,) = request.export.targets
    own = schemes.find(target.scheme, target.name)
    if not QUANTIZERS[own.kind].writes_integers and not schemes.reads_8bits(own):
        raise Unsupported(
            f"{target.name}: the scheme {own.name} has no integer product; one that has some is needed. Analyse the "
            "model for another target."
        )
    found = _sensitivity(request.export, target, progress)
    changes = {"mixed": "16-bit activations, as two 8-bit products", "vendor": QUANTIZERS[own.kind].promoted_to}
    with files.work_dir() as folder:
        trials = _Trials(request.export, folder, progress)
        costs = _costs(found.sites, trials) if request.is_costed or request.is_automatic else ()
        scheme = _cheapest(found.sites, costs, trials) if request.is_automatic else None
    return Analysis(
        target=target.name,
        change=changes.get(own.kind, "16-bit activations in and out"),
        sensitivity=found,
        costs=costs,
        trials=tuple(trials.done),
        found=scheme,
    )


def _sensitivity(request: ExportRequest, target: Target, progress: Progress) -> Sensitivity:
    located = pipeline.located_source(request)
    if located.takes_images:
        raise ConfigError(
            f"{request.model}: takes images, and products are ranked on texts. Export the model with --images, and "
            "measure its bundle with `edgeq validate BUNDLE --images FOLDER`."
        )
    texts = plan_texts(
        request.texts, request.column, request.validation, request.evaluation, request.samples, request.seed
    )
    find(target.backend, target.name).tools()
    progress("export", 0, 1)
    floats = stages.float_model(located, request.hidden_state, request.cache)
    progress("export", 1, 1)
    calibrated = stages.calibrated(floats, texts, request.seed, request.cache, progress)
    model = stages.quantized(target, calibrated, request.cache)
    limit = token_limit(target.buckets_tokens, model.max_sequence)
    samples = stages.validation(floats, texts, request.cache, limit).samples
    return stages.sensitivities(calibrated, model, samples, progress)


class _Trials:
    """Export the target with sets of products promoted, each set once, and keep the results."""

    def __init__(self, request: ExportRequest, folder: Path, progress: Progress) -> None:
        self._request = request
        self._folder = folder
        self._progress = progress
        self._known: dict[tuple[str, ...], tuple[Trial, Path]] = {}

    @property
    def done(self) -> list[Trial]:
        return [trial for trial, _ in self._known.values()]

    def scheme(self, names: Sequence[str]) -> Scheme:
        (target,) = self._request.targets
        return schemes.promote(schemes.find(target.scheme, target.name), names)

    def run(self, names: Sequence[str]) -> tuple[Trial, Path]:
        """Give the trial for a set of products, and its bundle; export them the first time."""
        scheme = self.scheme(names)
        if scheme.promoted not in self._known:
            number = len(self._known)
            path = self._folder / f"scheme_{number}.json"
            files.write_bytes(path, scheme.model_dump_json().encode())
            out = self._folder / str(number)
            wanted = replace(self._request, scheme=path, out=out, keep_failed=True, dry_run=False, promote=False)
            (made,) = pipeline.export(wanted, self._progress)
            trial = Trial(
                promoted=scheme.promoted, status=made.status, measures=made.parity, size_bytes=made.size_bytes
            )
            self._known[scheme.promoted] = trial, Path(made.path)
        return self._known[scheme.promoted]

    def extra_milliseconds(self, names: Sequence[str]) -> tuple[Interval | None, str | None]:
        """Give what promoting products adds to the latency of one text, or None and the reason.

        The artifacts with and without the promotion take turns.
        """
        paths = {"base": self.run(())[1], "promoted": self.run(names)[1]}
        manifest = load_manifest(paths["base"])
        ran_on = run_kind(manifest.target.runs_on)
        if ran_on != "device":
            return None, f"it runs here on {ran_on}, not on the device"
        limit = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)
        vocabulary = Tokenizer.from_file(paths["base"] / "tokenizer.json", limit).vocabulary
        jobs = {
            name: Job(model=str(path), threads=1, batch=1, sequence=min(TIMED_TOKENS, limit), vocabulary=vocabulary)
            for name, path in paths.items()
        }
        self._progress("measure", 0, 1)
        timed, _ = turns.timed_by_turns(jobs, TIMED_ROUNDS, WARMUP_ROUNDS)
        self._progress("measure", 1, 1)
        base, promoted = (timed[name].turns.rounds_ms for name in ("base", "promoted"))
        return paired_times.median_interval(paired_times.paired_differences(base, promoted)), None


def _costs(sites: Sequence[Site], trials: _Trials) -> tuple[Cost, ...]:
    base, _ = trials.run(())
    costs = []
    for channels, outputs in sorted({(item.channels, item.outputs) for item in sites}):
        alike = [item for item in sites if (item.channels, item.outputs) == (channels, outputs)]
        names = [name for item in alike for name in item.names]
        trial, _ = trials.run(names)
        extra, reason = trials.extra_milliseconds(names)
        costs.append(
            Cost(
                channels=channels,
                outputs=outputs,
                sites=len(alike),
                extra_bytes=round((trial.size_bytes - base.size_bytes) / len(alike)),
                extra_ms=None if extra is None else extra.median / len(alike),
                extra_ms_interval=_each(extra, len(alike)),
                reason=reason,
            )
        )
    return tuple(costs)


def _each(extra: Interval | None, sites: int) -> tuple[float, float] | None:
    """Divide the ends of an interval by the number of sites."""
    if extra is None or extra.low is None or extra.high is None:
        return None
    return extra.low / sites, extra.high / sites


def _cheapest(sites: Sequence[Site], costs: Sequence[Cost], trials: _Trials) -> Scheme:
    """Order sites by loss over cost, and find by bisection the fewest of them whose promotion meets the gate."""
    ordered = by_value(sites, costs)

    def run(count: int) -> Trial:
        return trials.run(_names(ordered[:count]))[0]

    if run(0).status == "passed":
        return trials.scheme(())
    low, high = 0, 1
    while run(high).status != "passed":
        if high >= len(ordered):
            failed = run(high).measures
            raise ParityFailed(
                f"with all {len(_names(ordered))} products promoted the gate does not hold either (centred cosine mean "
                f"{failed.centred_cosine_mean if failed else math.nan:.5f}): the loss is elsewhere. See the layers in "
                "edgeq compare --html, calibrate on texts like your own, or choose another target."
            )
        low, high = high, min(2 * high, len(ordered))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if run(middle).status == "passed" else (middle, high)
    return trials.scheme(_names(ordered[:high]))


def _names(sites: Sequence[Site]) -> list[str]:
    return [name for item in sites for name in item.names]


def by_value(sites: Sequence[Site], costs: Sequence[Cost]) -> list[Site]:
    """Order sites by loss over cost: in milliseconds where they were measured, else in bytes.

    Times differ by noise: none counts as less than a thousandth of the largest.
    """
    prices = {(item.channels, item.outputs): item for item in costs}
    is_timed = bool(costs) and all(item.extra_ms is not None for item in costs)

    def price(item: Site) -> float:
        cost = prices[item.channels, item.outputs]
        return float(cost.extra_ms or 0.0) if is_timed else float(cost.extra_bytes)

    floor = max((abs(price(item)) for item in sites), default=1.0) * 1e-3 or 1.0
    return sorted(sites, key=lambda item: (-item.loss / max(price(item), floor), item.names))
