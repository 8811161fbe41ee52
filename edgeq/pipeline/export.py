"""Export a model to one verified bundle for each target: run all stages in order."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.backends.contract import Backend, HasClientSettings
from edgeq.backends.registry import find
from edgeq.bundle.write import Lineage, require_replaceable, write
from edgeq.data import end_to_end
from edgeq.data.plans import plan_texts
from edgeq.data.prepare import limit_validation
from edgeq.data.tokens import token_limit
from edgeq.errors import ConfigError, ParityFailed, Unsupported
from edgeq.frontend import locate, settings
from edgeq.frontend.float_model import CONFIG
from edgeq.graph import external_data
from edgeq.pipeline import stages, structure
from edgeq.pipeline.golden_samples import golden_samples
from edgeq.pipeline.measure_parity import measure_parity, require_device
from edgeq.pipeline.request import ExportRequest, command
from edgeq.pipeline.stage_results import Calibrated, Floats
from edgeq.quantization import schemes
from edgeq.records import (
    EndToEnd,
    Measures,
    ParityReport,
    QdqModel,
    Record,
    RunKind,
    Scheme,
    SettingReport,
    Source,
    Status,
    Target,
)
from edgeq.system import files
from edgeq.system.cache import Cache
from edgeq.system.progress import Progress
from edgeq.version import VERSION

if TYPE_CHECKING:
    from edgeq.data.prepare import Plan


_log = logging.getLogger(__name__)


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


RunTargets = Callable[[Shared, ExportRequest, Progress], tuple[Exported, ...]]


def one_by_one(shared: Shared, request: ExportRequest, progress: Progress) -> tuple[Exported, ...]:
    """Make the bundles of all targets on this machine, one after the other."""
    return tuple(bundled(target, shared, request, progress) for target in request.targets)


def export(request: ExportRequest, progress: Progress, run_targets: RunTargets = one_by_one) -> tuple[Exported, ...]:
    """Export, calibrate, quantise, lower, measure parity, and write a bundle for each target.

    Args:
        request: the options.
        progress: called as `progress(stage, done, total)`.
        run_targets: makes the bundles of all targets from the float model and calibration that they share.

    Returns:
        One result for each target, in order; a failed one has no bundle unless `keep_failed` is set.

    Raises:
        EdgeqError: any stage; see `edgeq.errors`.
    """
    if request.images is not None and request.model.endswith(".onnx"):
        raise ConfigError(
            f"{request.model}: is an ONNX file, which comes in for texts only, and --images {request.images} is given. "
            "Give the directory that it was exported from, with its preprocessor_config.json."
        )
    located = located_source(request)
    plan = _plan(request, located)
    for target in request.targets:
        _scheme(request, target)
        backend = find(target.backend, target.name)
        backend.tools()
        require_device(backend, target)
        require_replaceable(request.out / target.name)
    if located.onnx is None:  # what cannot be honoured is told before anything is loaded
        settings.read(located.directory, located.takes_images)
    if request.dry_run:
        return tuple(_not_run(target) for target in request.targets)
    progress("export", 0, 1)
    floats = stages.float_model(located, request.hidden_state, request.cache)
    _warn_of_unknown(floats.source)
    progress("export", 1, 1)
    asked = [(target, _scheme(request, target)) for target in request.targets]
    structure.require(external_data.load(Path(floats.model.file.path)), floats.model, asked)
    calibrated = stages.calibrated(floats, plan, request.seed, request.cache, progress)
    return run_targets(Shared(floats, calibrated, plan), request, progress)


def located_source(request: ExportRequest) -> locate.Located:
    """Find the model of a request.

    Raises:
        EdgeqError: as `edgeq.frontend.locate.locate` does.
    """
    return locate.locate(
        request.model, request.pooling, request.onnx, request.dim,
        tower=request.tower, trust_remote_code=request.trust_remote_code,
    )  # fmt: skip


def _warn_of_unknown(source: Source) -> None:
    """Name the settings in a model's files that nothing here knows."""
    unknown = [name.removesuffix(settings.UNKNOWN) for name in source.unused_settings if settings.UNKNOWN in name]
    if unknown:
        _log.warning(
            "%s: edgeq knows no such settings, and nothing reads them: %s. The manifest lists them.",
            source.name, ", ".join(unknown),
        )  # fmt: skip


def _copied(folder: Path, empty: Path) -> None:
    """Copy a cache entry's files into an empty one; the cache writes the index itself."""
    shutil.copytree(folder, empty, dirs_exist_ok=True)


def _plan(request: ExportRequest, located: locate.Located) -> Plan:
    """Choose the calibration and validation samples, texts or images as the model takes them.

    Raises:
        ConfigError: the model takes the other kind of samples, or the files cannot be used.
    """
    if located.takes_images and request.images is None:
        raise ConfigError(f"{request.model}: takes images; give a folder of them to calibrate on with --images")
    if request.images is None:
        return plan_texts(
            request.texts, request.column, request.validation, request.evaluation, request.samples, request.seed
        )
    if not located.takes_images:
        way_out = "drop --images" if located.tower is None else "drop --images, or give --tower image"
        raise ConfigError(f"{request.model}: takes texts, and was given images ({request.images}); {way_out}")
    if request.texts is not None or request.column is not None or request.evaluation:
        raise ConfigError("--images stands alone: drop --texts, --column and --evaluation")
    from edgeq.data.image_plans import plan_images  # here: texts need no Pillow

    return plan_images(request.images, request.validation, request.samples, request.seed)


def bundled(target: Target, shared: Shared, request: ExportRequest, progress: Progress) -> Exported:
    """Quantise, lower, measure parity, and write one target's bundle; a missed gate is returned, not raised.

    Raises:
        EdgeqError: any of these stages.
    """
    floats, calibrated, plan = shared.floats, shared.calibrated, shared.plan
    stage = f"{target.name}: "
    backend = find(target.backend, target.name)
    progress(f"{stage}quantize", 0, 1)
    model = stages.quantized(target, calibrated, request.cache, _scheme(request, target))
    _refuse(backend, model, target)
    progress(f"{stage}quantize", 1, 1)
    progress(f"{stage}reference", 0, 1)
    limit = token_limit(target.buckets_tokens, model.max_sequence)
    few = target.gate.parity_texts
    validation = stages.validation(floats, limit_validation(plan, few), request.cache, limit)
    progress(f"{stage}reference", 1, 1)
    compared = end_to_end.compare(floats.config, floats.source, limit)
    end_to_end.require_same(compared, floats.source.name)
    with files.work_dir() as work:
        progress(f"{stage}lower", 0, 1)
        artifact = backend.lower(model, target, work)
        progress(f"{stage}lower", 1, 1)
        found, embeddings = measure_parity(
            backend, artifact, work, target, validation, model.max_sequence, partial(progress, f"{stage}compare"),
            compared,
        )  # fmt: skip
        size = sum(ref.size_bytes for ref in artifact.files)
        path = request.out / target.name
        is_written = found.status != "failed" or request.keep_failed
        kept_report = _keep_report(found, request.out, is_written)
        if is_written:
            made_by = command(request, floats.source.name, target)
            lineage = Lineage(
                VERSION, made_by, target, floats.source, floats.model, calibrated.equalized,
                calibrated.calibration, model, artifact, stages.versions(stages.EXPORT_TOOLS) | dict(backend.tools()),
            )  # fmt: skip
            golden = golden_samples(floats, validation, embeddings)
            told = backend.client_settings(target) if isinstance(backend, HasClientSettings) else None
            write(path, lineage, work, floats.folder / CONFIG, golden, found, request.overwrite, told)
    return Exported(
        target=target.name,
        path=str(path) if is_written else "",
        report=kept_report,
        status=found.status,
        ran_on=found.ran_on,
        parity=found.measures,
        size_bytes=size,
        failures=found.failures,
        other_settings=found.other_settings,
        end_to_end=found.end_to_end,
    )


def _scheme(request: ExportRequest, target: Target) -> Scheme:
    """Give the target's scheme, or the requested one, which may only promote further products."""
    own = schemes.find(target.scheme, target.name)
    if request.scheme is None:
        return own
    given = schemes.read(request.scheme)
    if given != schemes.promote(own, given.promoted):
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


def _refuse(backend: Backend, model: QdqModel, target: Target) -> None:
    found = backend.rejections(model, target)
    if found:
        listed = "\n".join(f"  - {item.rule} Found: {item.detail}" for item in found)
        raise Unsupported(f"{target.name}: {target.backend} cannot take this model:\n{listed}")


def require_passed(results: Sequence[Exported]) -> None:
    """Raise where a target missed its gate.

    Raises:
        ParityFailed: the message lists every missed limit and the paths of the reports.
    """
    failed = [item for item in results if item.status == "failed"]
    if failed:
        missed = " ".join(f"{item.target}: {' '.join(item.failures)} {_kept(item)}" for item in failed)
        raise ParityFailed(
            f"{missed} Calibrate on --texts like your own, on more --samples, or choose another target; "
            "--keep-failed writes such a bundle to look into."
        )


def _kept(exported: Exported) -> str:
    return f"The report is {exported.report or f'{exported.path}/parity.json'}."


def _not_run(target: Target) -> Exported:
    return Exported(
        target=target.name,
        path="",
        report="",
        status="not-run",
        ran_on="not-run",
        parity=None,
        size_bytes=0,
        failures=(),
    )
