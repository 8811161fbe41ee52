"""Hold the results of the stages that the targets of one export share, and keep their records in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgeq.data.batches import PIXELS, Samples
from edgeq.data.sessions import Embeddings
from edgeq.errors import ConfigError
from edgeq.frontend import float_model
from edgeq.records import Calibration, FloatModel, ImageSet, QdqModel, Record, Source, TextSet
from edgeq.system import files

FLOAT, EQUALIZED, STATISTICS = "model.onnx", "equalized.onnx", "calibration.npz"

FiledT = TypeVar("FiledT", FloatModel, Calibration, QdqModel)


@dataclass(frozen=True)
class Floats:
    """Hold a float model, and the cache entry with its files."""

    source: Source
    model: FloatModel
    folder: Path

    @property
    def config(self) -> Path:
        """Give the folder with the model's tokenizer or preprocessing."""
        return self.folder / float_model.CONFIG

    def at(self, folder: Path) -> Floats:
        """Give the same float model in another cache entry."""
        return Floats(self.source, moved(self.model, folder / FLOAT), folder)

    @property
    def takes_images(self) -> bool:
        """Tell whether the model reads pixels instead of tokens."""
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
            moved(self.equalized, folder / EQUALIZED), moved(self.calibration, folder / STATISTICS), folder
        )


@dataclass(frozen=True)
class Validation:
    """Hold the samples that parity is measured on, and FP32's vectors of them, float32[samples, dim].

    `texts` holds the texts, or the file names of images.
    """

    texts: tuple[str, ...]
    samples: Samples
    record: TextSet | ImageSet
    reference: Embeddings

    def chosen(self, rows: Sequence[int]) -> Validation:
        """Give the samples at these positions; the record stays that of the whole set."""
        texts = tuple(self.texts[row] for row in rows)
        return Validation(texts, self.samples.chosen(rows), self.record, self.reference[list(rows)])


def write_record(path: Path, record: Record) -> None:
    """Write a record into a cache entry as JSON."""
    files.write_bytes(path, record.model_dump_json(indent=1).encode())


def read_record(kind: type[FiledT], path: Path, file: Path) -> FiledT:
    """Read a record from a cache entry, with the present path of its file.

    Raises:
        ConfigError: the file is missing.
    """
    record = kind.model_validate_json(path.read_bytes())
    if not file.is_file():
        raise ConfigError(f"{file}: gone from the cache; run edgeq cache purge and try again")
    return moved(record, file)


def moved(record: FiledT, file: Path) -> FiledT:
    """Give a record whose file has another path."""
    return record.model_copy(update={"file": record.file.model_copy(update={"path": str(file)})})
