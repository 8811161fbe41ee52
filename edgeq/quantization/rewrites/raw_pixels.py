"""Fold the normalisation of pixels into the weights of the convolutions that read them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import PIXELS
from edgeq.graph import pixels
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, readers
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.patch_convolution import PATCHES

RAW = "pixels"  # the value behind which the graph reads what a camera or a decoder gives
_LEVEL = 128.0  # of the plane that says where the image is: in the middle, so that its weights are as large as others


def raw_pixels(model: ir.Model, statistics: Observed) -> Rewrites:
    """Let each `Conv` that reads normalised pixels read those from 0 to 255, as a camera or a decoder gives them.

    Before::

        pixel_values ─ Conv(W, b)

    After::

        pixel_values ─ Mul ─ Add ─ Transpose ─ pixels[batch, H, W, 3] ─ Transpose ─ Conv(W * factor, b + Σ W offset)

    and, where the convolution pads::

        … ─ pixels ─ Transpose ─ Pad(channels, 128) ─ Conv([W * factor, Σ W offset / 128], b)

    Zeros that a convolution puts around normalised pixels are the mean colour, so that a border pixel's sum lacks some
    of the offsets. A fourth channel of 128 inside of the image, and 0 around it as every channel, carries the offsets
    as far as the image goes: exactly, at the border, too.

    Mul, Add and the first Transpose undo the normalisation. A runtime that is given pixels leaves them out.

    Args:
        model: float; edited in place.
        statistics: by tensor; those of a convolution's windows are turned into those of pixels.
    """
    how, image = pixels.of(model), next((value for value in model.graph.inputs if value.name == PIXELS), None)
    found = [node for node in readers(image) if node.op_type != "Shape"] if image is not None else []
    shape = dims(image)
    if how is None or image is None or shape is None or any(not _is_convolution(node, image) for node in found):
        return Rewrites(0)
    first = next(node for node in model.graph if node in found)
    factor = add_constant(model.graph, "pixels/factor", (1.0 / how.factor).astype(np.float32)[:, None, None])
    offset = add_constant(model.graph, "pixels/offset", (-how.offset / how.factor).astype(np.float32)[:, None, None])
    scaled = add_node(first, "Mul", [image, factor], "pixels/scaled", like=image, role=Role.RAW_PIXELS)
    plain = add_node(first, "Add", [scaled, offset], "pixels/planes", like=image, role=Role.RAW_PIXELS)
    given = add_node(first, "Transpose", [plain], RAW, {"perm": [0, 2, 3, 1]}, role=Role.RAW_PIXELS)
    given.shape, given.dtype = ir.Shape([shape[0], *shape[2:], shape[1]]), ir.DataType.FLOAT
    raw = add_node(first, "Transpose", [given], "pixels/turned", {"perm": [0, 3, 1, 2]}, like=image)
    for node in found:
        _fold(model.graph, node, raw, how)
        name = f"{node.name}{PATCHES}"
        if name in statistics:
            statistics[name] = _of_pixels(statistics[name], how)
    return Rewrites(len(found))


def _is_convolution(node: ir.Node, image: ir.Value) -> bool:
    weight = constant(node.inputs[1]) if node.op_type == "Conv" else None
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return weight is not None and node.inputs[0] is image and group == 1


def _fold(graph: ir.Graph, node: ir.Node, raw: ir.Value, how: pixels.Normalization) -> None:
    weight, name = constant(node.inputs[1]), str(node.name)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if weight is None:
        return
    wide = weight.astype(np.float64)
    folded = wide * how.factor[:, None, None]
    offsets = (wide * how.offset[:, None, None]).sum(axis=1, keepdims=True)
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else [0]
    read = raw
    if any(pads):
        read = _with_plane(graph, node, raw)
        folded = np.concatenate([folded, offsets / _LEVEL], axis=1)
    else:
        total: NDArray[np.float64] = offsets.sum(axis=(1, 2, 3)) + (0.0 if bias is None else bias)
        bias = total.astype(np.float32)
    node.replace_input_with(0, read)
    node.replace_input_with(1, add_constant(graph, f"{name}/of_pixels", folded.astype(np.float32)))
    if bias is not None:
        node.resize_inputs(3)
        node.replace_input_with(2, add_constant(graph, f"{name}/of_pixels_bias", bias))


def _of_pixels(seen: Statistics, how: pixels.Normalization) -> Statistics:
    """Give the statistics of windows of pixels, from those of the same windows normalised."""
    places = len(seen.minimum) // len(how.factor)
    factor, offset = (np.repeat(numbers, places) for numbers in (how.factor, how.offset))
    low, high = (((edge - offset) / factor).astype(np.float32) for edge in (seen.minimum, seen.maximum))
    made = Statistics(low, high)
    if seen.mean is not None:
        made.mean = ((seen.mean - offset) / factor).astype(np.float32)
    if seen.mean is not None and seen.moment is not None:
        mixed = np.outer(offset, seen.mean)
        moment = seen.moment - mixed - mixed.T + np.outer(offset, offset)
        made.moment = (moment / np.outer(factor, factor)).astype(np.float32)
    return made


def _with_plane(graph: ir.Graph, node: ir.Node, raw: ir.Value) -> ir.Value:
    """Add a fourth channel of one number to the image."""
    shape = list(raw.shape or ())
    pads = add_constant(graph, f"{node.name}/plane", np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64))
    level = add_constant(graph, f"{node.name}/level", np.array(_LEVEL, np.float32))
    wide = add_node(node, "Pad", [raw, pads, level], f"{node.name}/with_plane")
    wide.shape, wide.dtype = ir.Shape([shape[0], 4, *shape[2:]]), ir.DataType.FLOAT
    return wide
