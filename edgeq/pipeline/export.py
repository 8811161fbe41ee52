"""Export a model to one verified bundle for each target: run all stages in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.backends.registry import find
from edgeq.bundle.write import require_replaceable
from edgeq.data.plans import plan_texts
from edgeq.errors import ConfigError, ParityFailed
from edgeq.frontend import locate, settings
from edgeq.graph import external_data
from edgeq.pipeline import stages, structure
from edgeq.pipeline.bundling import Exported, Shared, bundled, scheme_of
from edgeq.pipeline.measure_parity import require_device
from edgeq.pipeline.request import ExportRequest
from edgeq.records import (
    Source,
    Target,
)
from edgeq.system.progress import Progress

if TYPE_CHECKING:
    from edgeq.data.prepare import Plan


_log = logging.getLogger(__name__)


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
        scheme_of(request, target)
        backend = find(target.backend, target.name)
        backend.tools()
        require_device(backend, target)
        require_replaceable(request.out / target.name)
    if located.onnx is None:  # what cannot be honoured is told before anything is loaded
        settings.read(located.directory, located.takes_images)
    if request.dry_run:
        return tuple(_not_run(target) for target in request.targets)
    progress("export", 0, 1)
    asked = [(target, scheme_of(request, target)) for target in request.targets]
    structure.require_of_first_layer(located, request.hidden_state, asked, request.cache)
    floats = stages.float_model(located, request.hidden_state, request.cache)
    _warn_of_unknown(floats.source)
    progress("export", 1, 1)
    structure.require(external_data.load(Path(floats.model.file.path), is_mapped=True), floats.model, asked)
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


def require_passed(results: Sequence[Exported]) -> None:
    """Raise where a target missed its gate.

    Raises:
        ParityFailed: the message lists every missed limit and the paths of the reports.
    """
    failed = [item for item in results if item.status == "failed"]
    if failed:
        missed = " ".join(f"{item.target}: {' '.join(item.failures)}{_tried(item)} {_kept(item)}" for item in failed)
        raise ParityFailed(
            f"{missed} Calibrate on --texts like your own, on more --samples, or choose another target; "
            "--keep-failed writes such a bundle to look into."
        )


def _tried(exported: Exported) -> str:
    return "" if exported.promotion is None else f" That is with the most that can be: {exported.promotion.done}."


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
