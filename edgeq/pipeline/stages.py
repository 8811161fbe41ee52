"""Run the stages whose results targets share (export, calibrate, quantise, FP32 vectors), each cached by its inputs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import psutil

from edgeq.calibration import observe
from edgeq.calibration.file import load, save
from edgeq.data import end_to_end
from edgeq.data.prepare import identities, prepare
from edgeq.data.probes import text_probes
from edgeq.data.sessions import embed_batches
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.float_model import write_float_model
from edgeq.frontend.locate import Located
from edgeq.graph import dialect, external_data
from edgeq.graph.dialect import OutsideDialect
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.pipeline.stage_results import (
    EQUALIZED,
    FLOAT,
    STATISTICS,
    Calibrated,
    Floats,
    Validation,
    read_record,
    write_record,
)
from edgeq.quantization import quantize, schemes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import Calibration, FloatModel, QdqModel, Scheme, Source, Target, TextSet
from edgeq.system import files
from edgeq.system.cache import Cache, key
from edgeq.system.progress import Progress
from edgeq.targets import list_targets

if TYPE_CHECKING:
    from edgeq.data.prepare import Plan


_log = logging.getLogger(__name__)

EXPORT_TOOLS = ("torch", "transformers", "sentence-transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_MUCH_MEMORY_BYTES = 4_000_000_000
_QDQ = "qdq.onnx"
_TOKENS, _FEEDS, _WEIGHTS = "tokens.json", "feeds.json", "weights"


def float_model(located: Located, has_hidden_state: bool, cache: Cache, float_ops: tuple[str, ...] = ()) -> Floats:
    """Export the model, or take it from the cache.

    Raises:
        Unsupported: the graph leaves the dialect; the message says where, who could take it, and the way out.
        EdgeqError: any other failure of `edgeq.frontend.export.export`.
    """

    def make(folder: Path) -> None:
        try:
            record, model = write_float_model(located, folder, has_hidden_state, float_ops)
        except OutsideDialect as error:
            raise Unsupported(f"{error}\n{_ways_out(error.operators)}") from error
        write_record(folder / "source.json", record)
        write_record(folder / "model.json", model)

    name = key(
        source=located.sha256,
        compared=end_to_end.identity(),
        hidden_state=has_hidden_state,
        float_ops=list(float_ops),
        tools=versions(EXPORT_TOOLS),
    )
    folder = cache.entry("float-model", name, make)
    record = Source.model_validate_json((folder / "source.json").read_bytes()).model_copy(
        update={"name": located.display_name}
    )
    return Floats(record, read_record(FloatModel, folder / "model.json", folder / FLOAT), folder)


def _ways_out(operators: Sequence[str]) -> str:
    """Give the ways to convert a model with operators outside the dialect: which targets, with which option.

    Args:
        operators: of ONNX's standard, that a float island may hold; empty where no target takes the graph.
    """
    rewrite = "Write the line with operators of edgeq.graph.operators.DIALECT"
    if not operators:
        return f"{rewrite}, or export with opset {dialect.OPSET} and without optimisation."
    keep_floats = [each for each in list_targets() if QUANTIZERS[schemes.find(each.scheme, each.name).kind].keeps_float]
    options = " ".join(f"--float-op {name}" for name in operators)
    names = ", ".join(each.name for each in keep_floats)
    return (
        f"Integer-only targets cannot take that. Those that keep floats can ({names}): "
        f"give {options}, and it stays a float island. Else: {rewrite[0].lower()}{rewrite[1:]}, or exclude that module."
    )


def calibrated(floats: Floats, plan: Plan, seed: int, cache: Cache, progress: Progress) -> Calibrated:
    """Equalise the float model and observe its tensors on calibration samples, or read both from the cache.

    Args:
        floats: the float model.
        plan: which texts or images calibrate.
        seed: of the choice of texts that judge SmoothQuant's alphas.
        cache: for the equalised model and the statistics.
        progress: called as `progress(stage, done, total)`.
    """

    def make(folder: Path) -> None:
        given = prepare(plan.calibration, plan.origin, floats.config, floats.source.max_sequence)
        if isinstance(given.record, TextSet) and given.record.truncated:
            _log.warning(
                "%d of %d calibration texts were cut at the model's limit of %d tokens",
                given.record.truncated, given.record.count, floats.source.max_sequence,
            )  # fmt: skip
        model = external_data.load(Path(floats.model.file.path))
        _announce_memory(model, given.samples.longest)
        with external_data.outside_if_large(model, folder / _WEIGHTS):
            observed = calibrate.calibrate(model, given.samples, seed, progress)
            external_data.save(observed.model, folder / EQUALIZED)
            save(observed.statistics, folder / STATISTICS)
        if isinstance(given.samples, Tokens):  # a vendor's compiler that calibrates itself reads them
            files.write_bytes(folder / _TOKENS, json.dumps(given.samples.ids).encode())
        equalized = floats.model.model_copy(
            update={
                "file": files.file_ref(folder / EQUALIZED),
                "max_abs_error": observed.max_abs_error,
                "passes": (),
            }
        )
        record = Calibration(
            file=files.file_ref(folder / STATISTICS),
            float_model_sha256=equalized.file.sha256,
            texts=given.record,
            seed=seed,
            smoothing=observed.smoothing,
        )
        write_record(folder / "equalized.json", equalized)
        write_record(folder / "calibration.json", record)

    name = key(
        float_model=floats.model.file.sha256, texts=identities(plan.calibration), seed=seed, origin=plan.origin,
        tools=versions(("onnxruntime", "onnx", "onnx-ir", "numpy")),
    )  # fmt: skip
    folder = cache.entry("calibration", name, make)
    return Calibrated(
        read_record(FloatModel, folder / "equalized.json", folder / EQUALIZED),
        read_record(Calibration, folder / "calibration.json", folder / STATISTICS),
        folder,
    )


def quantized(target: Target, calibrated: Calibrated, cache: Cache, given: Scheme | None = None) -> QdqModel:
    """Quantise with the target's scheme, or read the QDQ model from the cache: targets with equal schemes share it.

    Args:
        target: whose scheme is used.
        calibrated: the equalised model and its calibration.
        cache: for QDQ models.
        given: the target's scheme with some products promoted.

    Raises:
        ConfigError: a product that is promoted is not there.
    """
    scheme = given or schemes.find(target.scheme, target.name)

    def make(folder: Path) -> None:
        statistics = load(Path(calibrated.calibration.file.path))
        equalized = external_data.load(Path(calibrated.equalized.file.path))
        with external_data.outside_if_large(equalized, folder / _WEIGHTS):
            model, integer, floats = quantize.quantize(equalized, statistics, scheme, feeds=_probes(calibrated))
            external_data.save(model, folder / _QDQ)
        unknown = sorted(set(scheme.promoted) - {node.name for node in model.graph.node})
        if unknown:
            raise ConfigError(
                f"the scheme {scheme.name} promotes {', '.join(unknown)}, which this model does not have. "
                "Run edgeq analyze --auto for this model."
            )
        if scheme.feeds:
            tokens = json.loads((calibrated.folder / _TOKENS).read_bytes())
            files.write_bytes(folder / _FEEDS, json.dumps(spaced_by_length(tokens, scheme.feeds)).encode())
        parent = calibrated.equalized
        record = QdqModel(
            file=files.file_ref(folder / _QDQ),
            float_model_sha256=parent.file.sha256,
            calibration_sha256=calibrated.calibration.file.sha256,
            scheme=scheme,
            inputs=parent.inputs,
            outputs=tuple(output.name for output in model.graph.output),
            dim=parent.dim,
            max_sequence=parent.max_sequence,
            integer_matmuls=integer,
            float_matmuls=floats,
            feeds=files.file_ref(folder / _FEEDS) if (folder / _FEEDS).is_file() else None,
        )
        write_record(folder / "qdq.json", record)

    name = key(
        float_model=calibrated.equalized.file.sha256, calibration=calibrated.calibration.file.sha256,
        scheme=scheme.model_dump(mode="json"), tools=versions(("onnx", "onnx-ir", "numpy")),
    )  # fmt: skip
    folder = cache.entry("qdq-model", name, make)
    found = read_record(QdqModel, folder / "qdq.json", folder / _QDQ)
    if found.feeds is None:
        return found
    return found.model_copy(update={"feeds": found.feeds.model_copy(update={"path": str(folder / _FEEDS)})})


def _probes(calibrated: Calibrated) -> tuple[Feeds, ...]:
    """Give calibration texts on which the rewrites of a scheme are proved; none for images."""
    path = calibrated.folder / _TOKENS
    return text_probes(json.loads(path.read_bytes())) if path.is_file() else ()


def spaced_by_length(tokens: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Choose texts evenly spaced by length, the longest and the shortest among them.

    Args:
        tokens: ids of each text.
        count: how many; all, where there are fewer.
    """
    by_length = sorted(tokens, key=len, reverse=True)
    return [by_length[position] for position in evenly_spaced(len(by_length), count)]


def validation(floats: Floats, plan: Plan, cache: Cache, limit: int) -> Validation:
    """Embed validation texts (cut at `limit` tokens) or images in FP32, or read the vectors from the cache."""
    given = prepare(plan.validation, plan.validation_origin, floats.config, limit)

    def make(folder: Path) -> None:
        session = FloatSession.of(Path(floats.model.file.path))
        vectors = embed_batches(session, batches(given.samples), len(given.samples))
        np.save(folder / "reference.npy", vectors, allow_pickle=False)

    name = key(
        float_model=floats.model.file.sha256,
        texts=identities(plan.validation),
        limit=limit,
        tools=versions(("onnxruntime",)),
    )
    reference = np.load(cache.entry("reference", name, make) / "reference.npy", allow_pickle=False)
    return Validation(given.names, given.samples, given.record, reference)


def _announce_memory(model: onnx.ModelProto, longest: int) -> None:
    """Log the peak memory of observing before it starts: attention grows with the square of a text's length."""
    needed, free = observe.peak_bytes(model, longest), psutil.virtual_memory().available
    said = f"calibrating on texts of up to {longest:,} tokens takes up to {needed / 1e9:.1f} GB"
    if needed > free:
        _log.warning("%s, and %.1f GB are free: give shorter texts if it is stopped", said, free / 1e9)
    else:
        _log.log(logging.WARNING if needed > _MUCH_MEMORY_BYTES else logging.INFO, "%s", said)


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Give the versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
