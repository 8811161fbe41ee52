"""Take a model to a verified bundle for each target: the whole export, in the order of the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx

from edgeq import __version__, backends, bundle, calibrate, machine, parity, quantize, schemes, source, storage
from edgeq import export as exporting
from edgeq.backends.contract import Backend, Embeddings, embed_batches
from edgeq.cache import Cache, key
from edgeq.errors import ConfigError, Unsupported
from edgeq.records import (
    Calibration,
    FloatModel,
    Measures,
    ParityReport,
    Place,
    QdqModel,
    Record,
    Source,
    Status,
    Target,
    TextSet,
)
from edgeq.reference import FloatSession
from edgeq.source import Located
from edgeq.texts import Tokenizer, Tokens, batches, text_set
from edgeq.textsets import TextPlan, plan_texts

Report = Callable[[str, int, int], None]
FiledT = TypeVar("FiledT", FloatModel, Calibration, QdqModel)

_log = logging.getLogger(__name__)

GOLDEN_TEXTS = 32
_EXPORT_TOOLS = ("torch", "transformers", "sentence-transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_FLOAT, _EQUALIZED, _STATISTICS, _QDQ = "model.onnx", "equalized.onnx", "calibration.npz", "qdq.onnx"


@dataclass(frozen=True)
class ExportRequest:
    """Hold what `edgeq export` was asked for; the fields are the options of the verb."""

    model: str
    targets: tuple[Target, ...]
    out: Path
    cache: Cache
    texts: Path | None = None
    column: str | None = None
    validation: Path | None = None
    evaluation: tuple[Path, ...] = ()
    pooling: str | None = None
    samples: int | None = None
    seed: int = 0
    hidden_state: bool = True
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
class _Float:
    """Hold a float model, where its files lie, and its tokenizer."""

    source: Source
    model: FloatModel
    folder: Path
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Calibrated:
    equalized: FloatModel
    calibration: Calibration
    folder: Path


@dataclass(frozen=True)
class _Validation:
    """Hold the texts that parity is measured on, and FP32's vectors of them, float32[texts, dim]."""

    texts: tuple[str, ...]
    tokens: Tokens
    record: TextSet
    reference: Embeddings


def export(request: ExportRequest, report: Report) -> tuple[Exported, ...]:
    """Export, calibrate, quantise, lower, compare, and write a bundle for each target.

    Args:
        request: what is wanted.
        report: called with (stage, done, total).

    Returns:
        One result for each target, in order; a failed one has no bundle unless `keep_failed` is set.

    Raises:
        EdgeqError: any stage; see `edgeq.errors`.
    """
    located = source.locate(request.model, request.pooling)
    texts = plan_texts(
        request.texts, request.column, request.validation, request.evaluation, request.samples, request.seed
    )
    for target in request.targets:
        schemes.find(target.scheme, target.name)
        backends.find(target.backend, target.name).tools()
        bundle.require_place(request.out / target.name)
    if request.dry_run:
        return tuple(_not_run(target) for target in request.targets)
    report("export", 0, 1)
    floats = _float_model(located, request)
    report("export", 1, 1)
    calibrated = _calibrated(floats, texts, request, report)
    report("reference", 0, 1)
    validation = _validation(floats, texts, request.cache)
    report("reference", 1, 1)
    return tuple(_bundle(target, floats, calibrated, validation, request, report) for target in request.targets)


def _float_model(located: Located, request: ExportRequest) -> _Float:
    """Export the model, or take it from the cache."""

    def make(folder: Path) -> None:
        record, model = exporting.export(located, folder, request.hidden_state)
        _write(folder / "source.json", record)
        _write(folder / "model.json", model)

    name = key(source=located.sha256, hidden_state=request.hidden_state, tools=_versions(_EXPORT_TOOLS))
    folder = request.cache.entry("float-model", name, make)
    record = Source.model_validate_json((folder / "source.json").read_bytes()).model_copy(
        update={"name": _name(located)}
    )
    tokenizer = Tokenizer.from_file(folder / exporting.CONFIG / "tokenizer.json", record.max_sequence)
    return _Float(record, _read(FloatModel, folder / "model.json", folder / _FLOAT), folder, tokenizer)


def _calibrated(floats: _Float, texts: TextPlan, request: ExportRequest, report: Report) -> _Calibrated:
    """Equalise and observe the float model, or take both from the cache."""

    def make(folder: Path) -> None:
        tokens = floats.tokenizer.encode(texts.calibration)
        if tokens.truncated:
            _log.warning(
                "%d of %d calibration texts were cut at the model's limit of %d tokens",
                tokens.truncated, len(tokens.ids), floats.source.max_sequence,
            )  # fmt: skip
        observed = calibrate.calibrate(onnx.load(floats.model.file.path), tokens, request.seed, report)
        storage.write_bytes(folder / _EQUALIZED, observed.model.SerializeToString(deterministic=True))
        calibrate.save(observed.statistics, folder / _STATISTICS)
        equalized = floats.model.model_copy(
            update={
                "file": storage.file_ref(folder / _EQUALIZED),
                "max_abs_error": observed.max_abs_error,
                "passes": (),
            }
        )
        record = Calibration(
            file=storage.file_ref(folder / _STATISTICS),
            float_model_sha256=equalized.file.sha256,
            texts=text_set(texts.origin, texts.calibration, tokens),
            seed=request.seed,
            migration=observed.migration,
        )
        _write(folder / "equalized.json", equalized)
        _write(folder / "calibration.json", record)

    name = key(
        float_model=floats.model.file.sha256, texts=list(texts.calibration), seed=request.seed, origin=texts.origin,
        tools=_versions(("onnxruntime", "onnx", "onnx-ir", "numpy")),
    )  # fmt: skip
    folder = request.cache.entry("calibration", name, make)
    return _Calibrated(
        _read(FloatModel, folder / "equalized.json", folder / _EQUALIZED),
        _read(Calibration, folder / "calibration.json", folder / _STATISTICS),
        folder,
    )


def _quantized(target: Target, calibrated: _Calibrated, cache: Cache) -> QdqModel:
    """Quantise by the target's scheme, or take the QDQ model from the cache: targets with one scheme share it."""
    scheme = schemes.find(target.scheme, target.name)

    def make(folder: Path) -> None:
        statistics = calibrate.load(Path(calibrated.calibration.file.path))
        model, integer, floats = quantize.quantize(onnx.load(calibrated.equalized.file.path), statistics, scheme)
        storage.write_bytes(folder / _QDQ, model.SerializeToString(deterministic=True))
        parent = calibrated.equalized
        record = QdqModel(
            file=storage.file_ref(folder / _QDQ),
            float_model_sha256=parent.file.sha256,
            calibration_sha256=calibrated.calibration.file.sha256,
            scheme=scheme,
            inputs=parent.inputs,
            outputs=parent.outputs,
            dim=parent.dim,
            max_sequence=parent.max_sequence,
            integer_matmuls=integer,
            float_matmuls=floats,
        )
        _write(folder / "qdq.json", record)

    name = key(
        float_model=calibrated.equalized.file.sha256, calibration=calibrated.calibration.file.sha256,
        scheme=scheme.model_dump(mode="json"), tools=_versions(("onnx", "onnx-ir", "numpy")),
    )  # fmt: skip
    folder = cache.entry("qdq-model", name, make)
    return _read(QdqModel, folder / "qdq.json", folder / _QDQ)


def _validation(floats: _Float, texts: TextPlan, cache: Cache) -> _Validation:
    """Embed the validation texts in FP32, or take the vectors from the cache."""
    tokens = floats.tokenizer.encode(texts.validation)

    def make(folder: Path) -> None:
        session = FloatSession.of(Path(floats.model.file.path))
        np.save(folder / "reference.npy", embed_batches(session, batches(tokens), len(tokens.ids)), allow_pickle=False)

    name = key(float_model=floats.model.file.sha256, texts=list(texts.validation), tools=_versions(("onnxruntime",)))
    reference = np.load(cache.entry("reference", name, make) / "reference.npy", allow_pickle=False)
    return _Validation(texts.validation, tokens, text_set(texts.validation_origin, texts.validation, tokens), reference)


def _bundle(
    target: Target,
    floats: _Float,
    calibrated: _Calibrated,
    validation: _Validation,
    request: ExportRequest,
    report: Report,
) -> Exported:
    """Quantise, lower, compare and write one target's bundle."""
    stage = f"{target.name}: "
    backend = backends.find(target.backend, target.name)
    report(f"{stage}quantize", 0, 1)
    model = _quantized(target, calibrated, request.cache)
    _refuse(backend, model, target)
    report(f"{stage}quantize", 1, 1)
    with storage.work_dir() as work:
        report(f"{stage}lower", 0, 1)
        artifact = backend.lower(model, target, work)
        session = backend.load(artifact, work, target)
        report(f"{stage}lower", 1, 1)
        report(f"{stage}compare", 0, 2)
        embeddings = embed_batches(session, batches(validation.tokens), len(validation.texts))
        report(f"{stage}compare", 1, 2)
        invariance = parity.invariance(session, validation.tokens, model.max_sequence, target.buckets_tokens)
        found = parity.report(
            target, machine.place(target.runs_on), artifact.placement, validation.reference, embeddings,
            validation.texts, validation.record, invariance,
        )  # fmt: skip
        report(f"{stage}compare", 2, 2)
        size = sum(ref.size_bytes for ref in artifact.files)
        path = request.out / target.name
        is_written = found.status != "failed" or request.keep_failed
        kept_report = _keep_report(found, request.out, is_written)
        if is_written:
            command = _command(request, floats.source.name, target)
            lineage = bundle.Lineage(
                __version__, command, target, floats.source, floats.model, calibrated.equalized,
                calibrated.calibration, model, artifact, _versions(_EXPORT_TOOLS) | dict(backend.tools()),
            )  # fmt: skip
            golden = _golden(validation, embeddings)
            bundle.write(path, lineage, work, floats.folder / exporting.CONFIG, golden, found, request.overwrite)
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


def _keep_report(found: ParityReport, out: Path, is_written: bool) -> str:
    """Keep the report of a refused bundle beside the place where it would stand; else remove an earlier one."""
    path = out / f"{found.target}.parity.json"
    with storage.storage_errors(f"writing {path}"):
        if is_written:
            path.unlink(missing_ok=True)
            return ""
        out.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(path, (found.model_dump_json(indent=2) + "\n").encode())
    return str(path)


def _refuse(backend: Backend, model: QdqModel, target: Target) -> None:
    found = backend.rejections(model, target)
    if found:
        listed = "\n".join(f"  - {item.rule} Found: {item.detail}" for item in found)
        raise Unsupported(f"{target.name}: {target.backend} cannot take this model:\n{listed}")


def _golden(validation: _Validation, embeddings: Embeddings) -> bundle.GoldenData:
    """Choose texts of evenly spread lengths, so that short and long ones are both among the golden."""
    by_length = sorted(range(len(validation.texts)), key=lambda row: len(validation.tokens.ids[row]))
    places = np.unique(np.linspace(0, len(by_length) - 1, min(GOLDEN_TEXTS, len(by_length))).round().astype(int))
    rows = [by_length[place] for place in places]
    chosen = Tokens(tuple(validation.tokens.ids[row] for row in rows), 0, validation.tokens.pad_id)
    (batch,) = batches(chosen, batch_size=len(rows), max_tokens=len(rows) * max(len(ids) for ids in chosen.ids))
    order = [rows[row] for row in batch.rows]
    return bundle.GoldenData(
        tuple(validation.texts[row] for row in order), batch.feeds.input_ids, batch.feeds.attention_mask,
        validation.reference[order], embeddings[order], validation.tokens.pad_id,
    )  # fmt: skip


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


def _name(located: Located) -> str:
    """Give a local directory's own name, and any other model's as the user wrote it."""
    return located.directory.name if Path(located.name).exists() else located.name


def _command(request: ExportRequest, name: str, target: Target) -> tuple[str, ...]:
    """Write the command that makes this one bundle again: only what decides its content, in a fixed order.

    Files go by their bare names: where they lay means nothing elsewhere, and would make equal bundles differ.
    """
    words = ["edgeq", "export", name, "--target", target.name]
    optional: Mapping[str, object | None] = {
        "--texts": request.texts and request.texts.name, "--column": request.column,
        "--validation": request.validation and request.validation.name,
        "--pooling": request.pooling, "--samples": request.samples, "--seed": request.seed or None,
    }  # fmt: skip
    for option, value in optional.items():
        words += [option, str(value)] if value is not None else []
    return (*words, *(() if request.hidden_state else ("--no-hidden-state",)))


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write(path: Path, record: Record) -> None:
    storage.write_bytes(path, record.model_dump_json(indent=1).encode())


def _read(kind: type[FiledT], path: Path, file: Path) -> FiledT:
    """Read a record from a cache entry; its file lies where the entry lies now."""
    record = kind.model_validate_json(path.read_bytes())
    if not file.is_file():
        raise ConfigError(f"{file}: gone from the cache; run edgeq cache purge and try again")
    return record.model_copy(update={"file": record.file.model_copy(update={"path": str(file)})})
