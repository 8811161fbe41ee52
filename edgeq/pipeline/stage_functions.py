"""Write the results of the stages that targets share into cache entries; each reads its request and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import psutil

from edgeq.calibration import observe
from edgeq.calibration.file import load, save
from edgeq.data.prepare import Prepared, prepare, prepare_images
from edgeq.data.probes import text_probes
from edgeq.data.sessions import embed_batches
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.errors import ConfigError
from edgeq.frontend.float_model import write_float_model
from edgeq.graph import external_data
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.pipeline.stage_requests import (
    CalibrationRequest,
    FloatModelRequest,
    QdqRequest,
    ReferenceRequest,
    SamplesRequest,
)
from edgeq.pipeline.stage_results import EQUALIZED, STATISTICS, write_record
from edgeq.quantization import quantize
from edgeq.records import Calibration, QdqModel, TextSet
from edgeq.system import files, memory
from edgeq.system.progress import Progress
from edgeq.system.stage import Stage, folder_of

QDQ, TOKENS, FEEDS, VECTORS = "qdq.onnx", "tokens.json", "feeds.json", "reference.npy"

_MUCH_MEMORY_BYTES = 4_000_000_000
_WEIGHTS = "weights"

_log = logging.getLogger(__name__)


def _write_float_model(request: FloatModelRequest, folder: Path, progress: Progress) -> None:
    """Export the source to a float model, and write its records beside it."""
    source, model = write_float_model(request.located, folder, request.hidden_state)
    write_record(folder / "source.json", source)
    write_record(folder / "model.json", model)


def _calibrate(request: CalibrationRequest, folder: Path, progress: Progress) -> None:
    """Equalise the float model, observe its tensors, and write the equalised model, the statistics and the records."""
    given = _prepared(request, request.origin)
    if isinstance(given.record, TextSet) and given.record.truncated:
        _log.warning(
            "%d of %d calibration texts were cut at the model's limit of %d tokens",
            given.record.truncated, given.record.count, request.limit,
        )  # fmt: skip
    with external_data.outside(folder / _WEIGHTS):
        model = external_data.load(Path(request.float_model.file.path), is_mapped=True)
        _announce_memory(model, given.samples.longest)
        observed = calibrate.calibrate(model, given.samples, request.seed, progress)
        save(observed.statistics, folder / STATISTICS)
        observed.statistics.clear()
        memory.trim()
        external_data.save(observed.model, folder / EQUALIZED)
    if isinstance(given.samples, Tokens):  # a vendor's compiler that calibrates itself reads them
        files.write_bytes(folder / TOKENS, json.dumps(given.samples.ids).encode())
    equalized = request.float_model.model_copy(
        update={"file": files.file_ref(folder / EQUALIZED), "max_abs_error": observed.max_abs_error, "passes": ()}
    )
    record = Calibration(
        file=files.file_ref(folder / STATISTICS),
        float_model_sha256=equalized.file.sha256,
        texts=given.record,
        seed=request.seed,
        smoothing=observed.smoothing,
    )
    write_record(folder / "equalized.json", equalized)
    write_record(folder / "calibration.json", record)


def _quantize(request: QdqRequest, folder: Path, progress: Progress) -> None:
    """Quantise the equalised model by the scheme, and write the QDQ model and its record."""
    scheme, parent = request.scheme, request.equalized
    tokens = json.loads(Path(request.tokens.path).read_bytes()) if request.tokens is not None else []
    statistics = load(Path(request.calibration.file.path))
    with external_data.outside(folder / _WEIGHTS):
        equalized = external_data.load(Path(parent.file.path), is_mapped=True)
        model, integer, floats = quantize.quantize(equalized, statistics, scheme, feeds=_probes(tokens))
        external_data.save(model, folder / QDQ)
    unknown = sorted({*scheme.promoted, *scheme.floats} - {node.name for node in model.graph.node})
    if unknown:
        raise ConfigError(
            f"the scheme {scheme.name} promotes {', '.join(unknown)}, which this model does not have. "
            "Run edgeq analyze --auto for this model."
        )
    if scheme.feeds:
        files.write_bytes(folder / FEEDS, json.dumps(spaced_by_length(tokens, scheme.feeds)).encode())
    record = QdqModel(
        file=files.file_ref(folder / QDQ),
        float_model_sha256=parent.file.sha256,
        calibration_sha256=request.calibration.file.sha256,
        scheme=scheme,
        inputs=parent.inputs,
        outputs=tuple(output.name for output in model.graph.output),
        dim=parent.dim,
        max_sequence=parent.max_sequence,
        integer_matmuls=integer,
        float_matmuls=floats,
        feeds=files.file_ref(folder / FEEDS) if scheme.feeds else None,
    )
    write_record(folder / "qdq.json", record)


def _embed(request: ReferenceRequest, folder: Path, progress: Progress) -> None:
    """Embed the samples in FP32, and write the vectors, float32[samples, dim]."""
    samples = _prepared(request, "").samples
    session = FloatSession.of(Path(request.float_model.file.path))
    np.save(folder / VECTORS, embed_batches(session, batches(samples), len(samples)), allow_pickle=False)


FLOAT_MODEL = Stage("float-model", FloatModelRequest, _write_float_model)
CALIBRATION = Stage("calibration", CalibrationRequest, _calibrate)
QDQ_MODEL = Stage("qdq-model", QdqRequest, _quantize)
REFERENCE = Stage("reference", ReferenceRequest, _embed)


def spaced_by_length(tokens: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Choose texts evenly spaced by length, the longest and the shortest among them.

    Args:
        tokens: ids of each text.
        count: how many; all, where there are fewer.
    """
    by_length = sorted(tokens, key=len, reverse=True)
    return [by_length[position] for position in evenly_spaced(len(by_length), count)]


def _prepared(request: SamplesRequest, origin: str) -> Prepared:
    """Tokenise the texts of a request, or preprocess its images."""
    config = folder_of(request.config)
    if request.images:
        return prepare_images([(Path(item.file.path), item.name) for item in request.images], origin, config)
    return prepare(request.texts, origin, config, request.limit)


def _probes(tokens: Sequence[Sequence[int]]) -> tuple[Feeds, ...]:
    """Give calibration texts on which the rewrites of a scheme are proved; none for images."""
    return text_probes(tokens) if tokens else ()


def _announce_memory(model: onnx.ModelProto, longest: int) -> None:
    """Log the peak memory of observing before it starts: attention grows with the square of a text's length."""
    needed, free = observe.peak_bytes(model, longest), psutil.virtual_memory().available
    said = f"calibrating on texts of up to {longest:,} tokens takes up to {needed / 1e9:.1f} GB"
    if needed > free:
        _log.warning("%s, and %.1f GB are free: give shorter texts if it is stopped", said, free / 1e9)
    else:
        _log.log(logging.WARNING if needed > _MUCH_MEMORY_BYTES else logging.INFO, "%s", said)
