"""Take a model to a verified bundle for each target: the whole export, in the order of the stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeq.backends.contract import Backend
from edgeq.backends.registry import find
from edgeq.bundle.golden import GoldenData
from edgeq.bundle.golden_images import GoldenImages, golden_images
from edgeq.bundle.write import Lineage, require_place, write
from edgeq.data.plans import plan_texts, spread_validation
from edgeq.data.sessions import Embeddings
from edgeq.data.splits import spread
from edgeq.data.tokens import Tokens, batches, token_feeds, token_limit
from edgeq.errors import ConfigError, ParityFailed, Unsupported
from edgeq.frontend import locate
from edgeq.frontend.export import CONFIG
from edgeq.frontend.onnx.find import OnnxOptions
from edgeq.pipeline import check, compare, stages
from edgeq.pipeline.stages import Report
from edgeq.quantization import schemes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import Measures, ParityReport, Place, QdqModel, Record, Scheme, Status, Target
from edgeq.system import files
from edgeq.system.cache import Cache
from edgeq.version import VERSION

if TYPE_CHECKING:
    from edgeq.data.prepare import Plan

GOLDEN_TEXTS, GOLDEN_IMAGES = 64, 16


@dataclass(frozen=True)
class ExportRequest:
    """Hold what `edgeq export` was asked for; the fields are the options of the verb."""

    model: str
    targets: tuple[Target, ...]
    out: Path
    cache: Cache
    texts: Path | None = None
    column: str | None = None
    images: Path | None = None
    validation: Path | None = None
    evaluation: tuple[Path, ...] = ()
    pooling: str | None = None
    dim: int | None = None
    tower: str | None = None
    onnx: OnnxOptions = OnnxOptions()
    samples: int | None = None
    seed: int = 0
    scheme: Path | None = None
    hidden_state: bool = True
    float_ops: tuple[str, ...] = ()
    keep_failed: bool = False
    overwrite: bool = False
    dry_run: bool = False


class Exported(Record):
    """Say what came of one target. Without a bundle `path` is empty, and `report` names the report of a missed gate."""

    target: str
    path: str
    report: str
    status: Status
    ran_on: Place
    parity: Measures | None
    size_bytes: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Shared:
    """Hold what the targets of one export share."""

    floats: stages.Floats
    calibrated: stages.Calibrated
    plan: Plan

    def at(self, cache: Cache, folder: Path) -> Shared:
        """Give the same from another machine's cache, whose entries are copied from a folder where they lack."""

        def entry(place: Path) -> Path:
            return cache.entry(place.parent.name, place.name, lambda empty: _copied(folder / place.name, empty))

        return Shared(
            self.floats.at(entry(self.floats.folder)), self.calibrated.at(entry(self.calibrated.folder)), self.plan
        )


Spread = Callable[[Shared, ExportRequest, Report], tuple[Exported, ...]]


def one_by_one(shared: Shared, request: ExportRequest, report: Report) -> tuple[Exported, ...]:
    """Make the bundles here, one after the other."""
    return tuple(bundled(target, shared, request, report) for target in request.targets)


def export(request: ExportRequest, report: Report, spread: Spread = one_by_one) -> tuple[Exported, ...]:
    """Export, calibrate, quantise, lower, compare, and write a bundle for each target.

    Args:
        request: what is wanted.
        report: called with (stage, done, total).
        spread: makes the bundles of all targets out of what they share.

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
    located = locate.locate(request.model, request.pooling, request.onnx, request.dim, tower=request.tower)
    plan = _plan(request, located)
    for target in request.targets:
        _refuse_islands(request, target)
        _scheme(request, target)
        backend = find(target.backend, target.name)
        backend.tools()
        compare.require_device(backend, target)
        require_place(request.out / target.name)
    if request.dry_run:
        return tuple(_not_run(target) for target in request.targets)
    report("export", 0, 1)
    floats = stages.float_model(located, request.hidden_state, request.cache, request.float_ops)
    report("export", 1, 1)
    for target in request.targets if floats.takes_images else ():
        as_given = check.unquantised(floats.model.file, floats.model.inputs, _scheme(request, target))
        _refuse(find(target.backend, target.name), as_given, target)
    calibrated = stages.calibrated(floats, plan, request.seed, request.cache, report)
    return spread(Shared(floats, calibrated, plan), request, report)


def _copied(folder: Path, empty: Path) -> None:
    """Fill a cache entry; its index is written anew."""
    shutil.copytree(folder, empty, dirs_exist_ok=True)


def _plan(request: ExportRequest, located: locate.Located) -> Plan:
    """Decide which texts or images calibrate, and which validate.

    Raises:
        ConfigError: the model takes the other kind, or the files cannot be used.
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
    from edgeq.data.plans import plan_images  # here: texts need no Pillow

    return plan_images(request.images, request.validation, request.samples, request.seed)


def bundled(target: Target, shared: Shared, request: ExportRequest, report: Report) -> Exported:
    """Quantise, lower, compare and write one target's bundle.

    Raises:
        EdgeqError: any of these stages; a missed gate is none.
    """
    floats, calibrated, plan = shared.floats, shared.calibrated, shared.plan
    stage = f"{target.name}: "
    backend = find(target.backend, target.name)
    report(f"{stage}quantize", 0, 1)
    model = stages.quantized(target, calibrated, request.cache, _scheme(request, target))
    _refuse(backend, model, target)
    report(f"{stage}quantize", 1, 1)
    report(f"{stage}reference", 0, 1)
    limit = token_limit(target.buckets_tokens, model.max_sequence)
    few = target.gate.parity_texts
    validation = stages.validation(floats, spread_validation(plan, few), request.cache, limit)
    report(f"{stage}reference", 1, 1)
    with files.work_dir() as work:
        report(f"{stage}lower", 0, 1)
        artifact = backend.lower(model, target, work)
        report(f"{stage}lower", 1, 1)
        found, embeddings = compare.compare(
            backend, artifact, work, target, validation, model.max_sequence, partial(report, f"{stage}compare")
        )
        size = sum(ref.size_bytes for ref in artifact.files)
        path = request.out / target.name
        is_written = found.status != "failed" or request.keep_failed
        kept_report = _keep_report(found, request.out, is_written)
        if is_written:
            command = _command(request, floats.source.name, target)
            lineage = Lineage(
                VERSION, command, target, floats.source, floats.model, calibrated.equalized,
                calibrated.calibration, model, artifact, stages.versions(stages.EXPORT_TOOLS) | dict(backend.tools()),
            )  # fmt: skip
            golden = _golden(floats, validation, embeddings)
            write(path, lineage, work, floats.folder / CONFIG, golden, found, request.overwrite)
    return Exported(
        target=target.name,
        path=str(path) if is_written else "",
        report=kept_report,
        status=found.status,
        ran_on=found.ran_on,
        parity=found.measures,
        size_bytes=size,
        failures=found.failures,
    )


def _scheme(request: ExportRequest, target: Target) -> Scheme:
    """Give the target's scheme, or the one that was asked for, which differs in promoted products only."""
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


def _refuse_islands(request: ExportRequest, target: Target) -> None:
    """Refuse float islands where nothing may stay float."""
    if request.float_ops and not QUANTIZERS[schemes.find(target.scheme, target.name).kind].keeps_float:
        raise Unsupported(
            f"{target.name}: its scheme {target.scheme} leaves nothing float, so {', '.join(request.float_ops)} cannot "
            "stay. Choose a target that keeps floats (`edgeq targets`), or write the model without."
        )


def _keep_report(found: ParityReport, out: Path, is_written: bool) -> str:
    """Keep the report of a refused bundle beside the place where it would stand; else remove an earlier one."""
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


def _golden(
    floats: stages.Floats, validation: stages.Validation, embeddings: Embeddings | None
) -> GoldenData | GoldenImages:
    """Choose texts of evenly spread lengths, so that short and long ones are both among the golden; or images."""
    if not isinstance(validation.samples, Tokens):
        rows = list(spread(range(len(validation.texts)), GOLDEN_IMAGES))
        return golden_images(
            floats.config, validation.samples.chosen(rows), [validation.texts[row] for row in rows],
            validation.reference[rows], None if embeddings is None else embeddings[rows],
        )  # fmt: skip
    tokens = validation.samples
    by_length = sorted(range(len(validation.texts)), key=lambda row: len(tokens.ids[row]))
    places = np.unique(np.linspace(0, len(by_length) - 1, min(GOLDEN_TEXTS, len(by_length))).round().astype(int))
    rows = [by_length[place] for place in places]
    chosen = tokens.chosen(rows)
    (batch,) = batches(chosen, batch_size=len(rows), max_tokens=len(rows) * max(len(ids) for ids in chosen.ids))
    order, feeds = [rows[row] for row in batch.rows], token_feeds(batch.feeds)
    return GoldenData(
        tuple(validation.texts[row] for row in order), feeds.input_ids, feeds.attention_mask,
        validation.reference[order], None if embeddings is None else embeddings[order], tokens.pad_id,
    )  # fmt: skip


def require_passed(results: Sequence[Exported]) -> None:
    """Refuse to go on where a bundle missed its gate.

    Raises:
        ParityFailed: with every limit that was missed, and where the reports are.
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


def _command(request: ExportRequest, name: str, target: Target) -> tuple[str, ...]:
    """Write the command that makes this one bundle again: only what decides its content, in a fixed order.

    Files go by their bare names: where they lay means nothing elsewhere, and would make equal bundles differ.
    """
    words = ["edgeq", "export", name, "--target", target.name]
    optional: Mapping[str, object | None] = {
        "--texts": request.texts and request.texts.name, "--column": request.column,
        "--images": request.images and request.images.name, "--tower": request.tower,
        "--validation": request.validation and request.validation.name,
        "--pooling": request.pooling, "--dim": request.dim,
        "--tokenizer": request.onnx.tokenizer and request.onnx.tokenizer.name,
        "--max-sequence": request.onnx.max_sequence, "--scheme": request.scheme and request.scheme.name,
        "--samples": request.samples, "--seed": request.seed or None,
    }  # fmt: skip
    for option, value in optional.items():
        words += [option, str(value)] if value is not None else []
    words += [word for name in request.float_ops for word in ("--float-op", name)]
    if request.onnx.normalize is not None:
        words.append("--normalize" if request.onnx.normalize else "--no-normalize")
    return (*words, *(() if request.hidden_state else ("--no-hidden-state",)))
