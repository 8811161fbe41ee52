"""Make one target's bundle: quantise, lower, measure parity, promote products where the gate is missed, and write."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.backends.contract import Backend, HasClientSettings
from edgeq.backends.registry import find
from edgeq.bundle.write import Lineage, write
from edgeq.codecs.statistics import statistics_bytes
from edgeq.data import end_to_end
from edgeq.data.tokens import token_limit
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.float_model import CONFIG
from edgeq.pipeline import promotion, stages
from edgeq.pipeline.golden_samples import golden_samples
from edgeq.pipeline.measure_parity import Measured, measure_parity
from edgeq.pipeline.request import ExportRequest, command
from edgeq.pipeline.stage_results import Calibrated, Floats
from edgeq.quantization import schemes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import (
    Artifact,
    EndToEnd,
    Island,
    Measures,
    ParityReport,
    Promotion,
    QdqModel,
    Record,
    RunKind,
    Scheme,
    SettingReport,
    Status,
    Target,
)
from edgeq.system import files
from edgeq.system.cache import Cache
from edgeq.system.progress import Progress
from edgeq.version import VERSION

if TYPE_CHECKING:
    from edgeq.data.prepare import Plan


class Exported(Record):
    """Hold the result for one target; without a bundle `path` is empty, and `report` names its parity report."""

    target: str
    path: str
    report: str
    status: Status
    ran_on: RunKind
    parity: Measures | None
    size_bytes: int
    failures: tuple[str, ...]
    end_to_end: EndToEnd | None = None
    other_settings: tuple[SettingReport, ...] = ()  # the same artifact with other runtime settings
    promotion: Promotion | None = None
    islands: tuple[Island, ...] = ()  # operators outside the dialect that stay float


@dataclass(frozen=True)
class Shared:
    """Hold the float model, the calibration and the plan of samples that all targets of one export share."""

    floats: Floats
    calibrated: Calibrated
    plan: Plan

    def at(self, cache: Cache, folder: Path) -> Shared:
        """Give the same results with paths in another cache, filled from a folder where its entries are missing."""

        def entry(path: Path) -> Path:
            return cache.entry(path.parent.name, path.name, lambda empty: _copied(folder / path.name, empty))

        return Shared(
            self.floats.at(entry(self.floats.folder)), self.calibrated.at(entry(self.calibrated.folder)), self.plan
        )


@dataclass(frozen=True)
class _Attempt:
    """Hold one artifact of a target with its parity, before a bundle is written."""

    model: QdqModel
    artifact: Artifact
    folder: Path  # that the artifact's paths are relative to
    measured: Measured

    @property
    def report(self) -> ParityReport:
        """Give the parity report."""
        return self.measured.report

    @property
    def size_bytes(self) -> int:
        """Give the size of the artifact's files."""
        return sum(ref.size_bytes for ref in self.artifact.files)


def bundled(target: Target, shared: Shared, request: ExportRequest, progress: Progress) -> Exported:
    """Quantise, lower, measure parity, and write one target's bundle; a missed gate is returned, not raised.

    Where the gate is missed, products are promoted until it holds, unless the request forbids it or names a scheme.

    Raises:
        EdgeqError: any of these stages.
    """
    floats, calibrated = shared.floats, shared.calibrated
    backend = find(target.backend, target.name)
    scheme = scheme_of(request, target)
    limit = token_limit(target.buckets_tokens, floats.model.max_sequence)
    compared = end_to_end.compare(floats.config, floats.source, limit)
    end_to_end.require_same(compared, floats.source.name)
    with files.work_dir() as work:
        attempt = first = _attempted(target, shared, request, scheme, compared, work, progress)
        promoted = None
        if request.promote and request.scheme is None:
            few, quantizer = first.measured.validation.samples, QUANTIZERS[scheme.kind]
            weighed = None
            if quantizer.keeps_float and quantizer.writes_integers:  # a compiler's promoted products are float
                weighed = partial(stages.weight_losses, calibrated, first.model, few, progress)
            attempt, promoted = promotion.until_passed(
                first, scheme,
                lambda more: _attempted(target, shared, request, more, compared, work, progress),
                lambda: stages.sensitivities(calibrated, first.model, few, progress),
                weighed, quantizer.promoted_to,
            )  # fmt: skip
        found = attempt.report.model_copy(update={"promotion": promoted})
        path = request.out / target.name
        is_written = found.status != "failed" or request.keep_failed
        kept_report = _keep_report(found, request.out, is_written)
        if is_written:
            made_by = command(request, floats.source.name, target)
            lineage = Lineage(
                VERSION, made_by, target, floats.source, floats.model, calibrated.equalized, calibrated.calibration,
                attempt.model, attempt.artifact, stages.versions(stages.EXPORT_TOOLS) | dict(backend.tools()),
            )  # fmt: skip
            golden = golden_samples(floats, attempt.measured.validation, attempt.measured.embeddings)
            told = backend.client_settings(target) if isinstance(backend, HasClientSettings) else None
            codecs = statistics_bytes(stages.vector_statistics(floats, shared.plan, request.cache))
            write(path, lineage, attempt.folder, floats.folder / CONFIG, golden, found, request.overwrite, told, codecs)
    return Exported(
        target=target.name,
        path=str(path) if is_written else "",
        report=kept_report,
        status=found.status,
        ran_on=found.ran_on,
        parity=found.measures,
        size_bytes=attempt.size_bytes,
        failures=found.failures,
        other_settings=found.other_settings,
        end_to_end=found.end_to_end,
        promotion=found.promotion,
        islands=floats.model.islands,
    )


def _attempted(
    target: Target, shared: Shared, request: ExportRequest, scheme: Scheme, compared: EndToEnd, work: Path,
    progress: Progress,
) -> _Attempt:  # fmt: skip
    """Quantise by a scheme, lower into a folder of its own below `work`, and measure parity."""
    floats, calibrated, plan = shared.floats, shared.calibrated, shared.plan
    stage = f"{target.name}: "
    backend = find(target.backend, target.name)
    progress(f"{stage}quantize", 0, 1)
    model = stages.quantized(target, calibrated, request.cache, scheme)
    refuse(backend, model, target)
    progress(f"{stage}quantize", 1, 1)
    progress(f"{stage}reference", 0, 1)
    limit = token_limit(target.buckets_tokens, model.max_sequence)
    qdq = Path(model.file.path) if QUANTIZERS[model.scheme.kind].writes_integers else None
    few = target.gate.parity_texts if qdq is None else None  # on the QDQ model all texts run
    parts = stages.growing_validation(floats, plan, request.cache, limit, few)
    validation = chain((next(parts),), parts)
    progress(f"{stage}reference", 1, 1)
    folder = work / str(len(list(work.iterdir())))  # one for each attempt
    folder.mkdir()
    progress(f"{stage}lower", 0, 1)
    artifact = backend.lower(model, target, folder)
    progress(f"{stage}lower", 1, 1)
    measured = measure_parity(
        backend, artifact, folder, target, validation, model.max_sequence, partial(progress, f"{stage}compare"),
        compared, qdq,
    )  # fmt: skip
    return _Attempt(model, artifact, folder, measured)


def scheme_of(request: ExportRequest, target: Target) -> Scheme:
    """Give the target's scheme, or the requested one, which may only promote further products."""
    own = schemes.find(target.scheme, target.name)
    if request.scheme is None:
        return own
    given = schemes.read(request.scheme)
    if not schemes.is_form(given, own):
        raise ConfigError(
            f"{request.scheme}: is a form of {schemes.base_name(given)}; {target.name} takes {own.name}. "
            "Leave --scheme out, or choose another target."
        )
    return given


def _keep_report(found: ParityReport, out: Path, is_written: bool) -> str:
    """Write the parity report of a refused bundle to OUT/TARGET.parity.json; remove it where the bundle is written."""
    path = out / f"{found.target}.parity.json"
    with files.storage_errors(f"writing {path}"):
        if is_written:
            path.unlink(missing_ok=True)
            return ""
        out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, (found.model_dump_json(indent=2) + "\n").encode())
    return str(path)


def refuse(backend: Backend, model: QdqModel, target: Target) -> None:
    """Raise where a rule of the backend is not met.

    Raises:
        Unsupported: the message lists every such rule.
    """
    found = backend.rejections(model, target)
    if found:
        listed = "\n".join(f"  - {item.rule} Found: {item.detail}" for item in found)
        raise Unsupported(f"{target.name}: {target.backend} cannot take this model:\n{listed}")


def _copied(folder: Path, empty: Path) -> None:
    """Copy a cache entry's files into an empty one; the cache writes the index itself."""
    shutil.copytree(folder, empty, dirs_exist_ok=True)
