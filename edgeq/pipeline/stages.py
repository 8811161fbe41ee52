"""Make what the targets of one export share, each stage once, and take it from the cache the next time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx
import psutil

from edgeq.calibration import observe
from edgeq.calibration.file import load, save
from edgeq.data.batches import PIXELS, Samples
from edgeq.data.prepare import identities, prepare
from edgeq.data.probes import text_probes
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend import export
from edgeq.frontend.locate import Located
from edgeq.graph import dialect, external_data
from edgeq.graph.dialect import OutsideDialect
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize, schemes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import Calibration, FloatModel, ImageSet, QdqModel, Record, Scheme, Source, Target, TextSet
from edgeq.system import files
from edgeq.system.cache import Cache, key
from edgeq.targets import list_targets

if TYPE_CHECKING:
    from edgeq.data.prepare import Plan

Report = Callable[[str, int, int], None]
FiledT = TypeVar("FiledT", FloatModel, Calibration, QdqModel)

_log = logging.getLogger(__name__)

EXPORT_TOOLS = ("torch", "transformers", "sentence-transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_MUCH_MEMORY_BYTES = 4_000_000_000
_FLOAT, _EQUALIZED, _STATISTICS, _QDQ = "model.onnx", "equalized.onnx", "calibration.npz", "qdq.onnx"
_TOKENS, _FEEDS, _WEIGHTS = "tokens.json", "feeds.json", "weights"


@dataclass(frozen=True)
class Floats:
    """Hold a float model, and where its files lie."""

    source: Source
    model: FloatModel
    folder: Path

    @property
    def config(self) -> Path:
        """Give the folder with the model's tokenizer or preprocessing."""
        return self.folder / export.CONFIG

    def at(self, folder: Path) -> Floats:
        """Give the same float model in another cache entry."""
        return Floats(self.source, _moved(self.model, folder / _FLOAT), folder)

    @property
    def takes_images(self) -> bool:
        """Tell whether the model reads pixels, not tokens."""
        return self.model.inputs == (PIXELS,)


@dataclass(frozen=True)
class Calibrated:
    """Hold an equalised float model, its calibration, and the cache entry of both."""

    equalized: FloatModel
    calibration: Calibration
    folder: Path

    def at(self, folder: Path) -> Calibrated:
        """Give the same in another cache entry."""
        return Calibrated(
            _moved(self.equalized, folder / _EQUALIZED), _moved(self.calibration, folder / _STATISTICS), folder
        )


@dataclass(frozen=True)
class Validation:
    """Hold what parity is measured on, and FP32's vectors of it, float32[samples, dim].

    `texts` are the texts, or the names of images.
    """

    texts: tuple[str, ...]
    samples: Samples
    record: TextSet | ImageSet
    reference: Embeddings


def float_model(located: Located, has_hidden_state: bool, cache: Cache, float_ops: tuple[str, ...] = ()) -> Floats:
    """Export the model, or take it from the cache.

    Raises:
        Unsupported: the graph leaves the dialect; the message says where, who could take it, and the way out.
        EdgeqError: any other failure of `exporting.export`.
    """

    def make(folder: Path) -> None:
        try:
            record, model = export.export(located, folder, has_hidden_state, float_ops)
        except OutsideDialect as error:
            raise Unsupported(f"{error}\n{_ways_out(error.operators)}") from error
        _write(folder / "source.json", record)
        _write(folder / "model.json", model)

    name = key(
        source=located.sha256, hidden_state=has_hidden_state, float_ops=list(float_ops), tools=versions(EXPORT_TOOLS)
    )
    folder = cache.entry("float-model", name, make)
    record = Source.model_validate_json((folder / "source.json").read_bytes()).model_copy(
        update={"name": located.display_name}
    )
    return Floats(record, _read(FloatModel, folder / "model.json", folder / _FLOAT), folder)


def _ways_out(operators: Sequence[str]) -> str:
    """Say which targets could still take these operators, and how; what is not the standard's nobody takes."""
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


def calibrated(floats: Floats, plan: Plan, seed: int, cache: Cache, report: Report) -> Calibrated:
    """Equalise and observe the float model, or take both from the cache."""

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
            observed = calibrate.calibrate(model, given.samples, seed, report)
            external_data.save(observed.model, folder / _EQUALIZED)
            save(observed.statistics, folder / _STATISTICS)
        if isinstance(given.samples, Tokens):  # for vendors whose compilers calibrate themselves
            files.write_bytes(folder / _TOKENS, json.dumps(given.samples.ids).encode())
        equalized = floats.model.model_copy(
            update={
                "file": files.file_ref(folder / _EQUALIZED),
                "max_abs_error": observed.max_abs_error,
                "passes": (),
            }
        )
        record = Calibration(
            file=files.file_ref(folder / _STATISTICS),
            float_model_sha256=equalized.file.sha256,
            texts=given.record,
            seed=seed,
            migration=observed.migration,
        )
        _write(folder / "equalized.json", equalized)
        _write(folder / "calibration.json", record)

    name = key(
        float_model=floats.model.file.sha256, texts=identities(plan.calibration), seed=seed, origin=plan.origin,
        tools=versions(("onnxruntime", "onnx", "onnx-ir", "numpy")),
    )  # fmt: skip
    folder = cache.entry("calibration", name, make)
    return Calibrated(
        _read(FloatModel, folder / "equalized.json", folder / _EQUALIZED),
        _read(Calibration, folder / "calibration.json", folder / _STATISTICS),
        folder,
    )


def quantized(target: Target, calibrated: Calibrated, cache: Cache, given: Scheme | None = None) -> QdqModel:
    """Quantise by the target's scheme, or take the QDQ model from the cache: targets with one scheme share it.

    Args:
        target: whose scheme is used.
        calibrated: the equalised model and its calibration.
        cache: where QDQ models are kept.
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
            files.write_bytes(folder / _FEEDS, json.dumps(spread(tokens, scheme.feeds)).encode())
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
        _write(folder / "qdq.json", record)

    name = key(
        float_model=calibrated.equalized.file.sha256, calibration=calibrated.calibration.file.sha256,
        scheme=scheme.model_dump(mode="json"), tools=versions(("onnx", "onnx-ir", "numpy")),
    )  # fmt: skip
    folder = cache.entry("qdq-model", name, make)
    found = _read(QdqModel, folder / "qdq.json", folder / _QDQ)
    if found.feeds is None:
        return found
    return found.model_copy(update={"feeds": found.feeds.model_copy(update={"path": str(folder / _FEEDS)})})


def _probes(calibrated: Calibrated) -> tuple[Feeds, ...]:
    """Give calibration texts on which the rewrites of a scheme are proved; none for images."""
    path = calibrated.folder / _TOKENS
    return text_probes(json.loads(path.read_bytes())) if path.is_file() else ()


def spread(tokens: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Choose texts of evenly spread lengths, the longest and the shortest among them.

    Args:
        tokens: ids of each text.
        count: how many; all, where there are fewer.
    """
    by_length = sorted(tokens, key=len, reverse=True)
    places = np.unique(np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(int))
    return [by_length[place] for place in places]


def validation(floats: Floats, plan: Plan, cache: Cache, limit: int) -> Validation:
    """Embed the validation texts, cut at `limit` tokens, or images in FP32, or take the vectors from the cache."""
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
    """Say beforehand how much memory observing may take: attention over long texts grows with their square."""
    needed, free = observe.peak_bytes(model, longest), psutil.virtual_memory().available
    said = f"calibrating on texts of up to {longest:,} tokens takes up to {needed / 1e9:.1f} GB"
    if needed > free:
        _log.warning("%s, and %.1f GB are free: give shorter texts if it is stopped", said, free / 1e9)
    else:
        _log.log(logging.WARNING if needed > _MUCH_MEMORY_BYTES else logging.INFO, "%s", said)


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Give the version of each distribution that is installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write(path: Path, record: Record) -> None:
    files.write_bytes(path, record.model_dump_json(indent=1).encode())


def _read(kind: type[FiledT], path: Path, file: Path) -> FiledT:
    """Read a record from a cache entry; its file lies where the entry lies now."""
    record = kind.model_validate_json(path.read_bytes())
    if not file.is_file():
        raise ConfigError(f"{file}: gone from the cache; run edgeq cache purge and try again")
    return _moved(record, file)


def _moved(record: FiledT, file: Path) -> FiledT:
    return record.model_copy(update={"file": record.file.model_copy(update={"path": str(file)})})
