"""Note in a float model how the pixels of its images are normalised: a runtime of integers folds that into weights.

A model of images reads pixel_values = pixels * factor + offset, with three factors and offsets. They stand in the ONNX
model's metadata, so that copying a model and saving it keeps them; `strip` takes them out of a model that is shipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

KEY = "edgeq.pixels"


@dataclass(frozen=True)
class Normalization:
    """Hold what takes pixels from 0 to 255 to what a model reads, for each colour channel.

    Attributes:
        factor: float64[channels].
        offset: float64[channels].
    """

    factor: NDArray[np.float64]
    offset: NDArray[np.float64]


def note(model: onnx.ModelProto, factor: NDArray[np.floating], offset: NDArray[np.floating]) -> None:
    """Write the normalisation of pixels into the metadata of an ONNX model."""
    strip(model)
    model.metadata_props.add(key=KEY, value=json.dumps([factor.tolist(), offset.tolist()]))


def of(model: ir.Model) -> Normalization | None:
    """Read the normalisation of pixels from the metadata of a model; None where there is none."""
    written = model.metadata_props.get(KEY)
    if written is None:
        return None
    factor, offset = (np.array(numbers, np.float64) for numbers in json.loads(written))
    return Normalization(factor, offset)


def strip(model: onnx.ModelProto) -> None:
    """Take the normalisation of pixels out of the metadata of an ONNX model."""
    kept = [item for item in model.metadata_props if item.key != KEY]
    if len(kept) < len(model.metadata_props):
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
