"""Fix the shapes of a QDQ model for one bucket, with float or quantised inputs and outputs as the target asks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import LoweringFailed
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import add_constant, constant, made_by, replace_uses, required
from edgeq.graph.evaluate import computed
from edgeq.graph.static_shapes import fix_shapes

_INDEXED = ("Gather", "GatherElements")


def static(model: ir.Model, length: int, has_quantized_io: bool) -> onnx.ModelProto:
    """Give the model for one text of `length` tokens.

    Args:
        model: the QDQ model with dynamic shapes; edited in place.
        length: of the bucket, in tokens.
        has_quantized_io: int32 ids and mask in, uint16 vectors out; else int64 and float32.

    Raises:
        LoweringFailed: a shape is not known in advance.
    """
    if has_quantized_io:
        _drop_output_dequantizer(model.graph)
    _store_positions(model.graph, length)
    return fix_shapes(model, length, ir.DataType.INT32 if has_quantized_io else ir.DataType.INT64)


def _store_positions(graph: ir.Graph, length: int) -> None:
    """Replace what is quantised, or looked up by, and follows from the length alone, by a constant; equal ones are one.

    Rotations (RoPE), biases by distance, and causal and local masks are such.
    """
    stored: dict[tuple[str, bytes], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and follows_from_sizes(node.inputs[0]):
            old, array = node.outputs[0], _codes(node, _of_length(node.inputs[0], length))
        elif node.op_type in _INDEXED and follows_from_sizes(node.inputs[1]) and not follows_from_sizes(node.inputs[0]):
            old, array = required(node.inputs[1]), _of_length(node.inputs[1], length)
        else:
            continue
        key = (f"{array.dtype} {array.shape}", array.tobytes())
        if key not in stored:
            stored[key] = add_constant(graph, f"{old.name}/of_length", array)
        replace_uses(old, stored[key])


def _of_length(value: ir.Value | None, length: int) -> NDArray[np.generic]:
    ones = np.ones((1, length), np.int64)
    return computed(value, {"input_ids": ones, "attention_mask": ones})


def _codes(node: ir.Node, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Quantise as a QuantizeLinear does: divide, round half to even, add the zero point, saturate."""
    scale, zero_point = (constant(value) for value in node.inputs[1:])
    if scale is None or zero_point is None:
        raise LoweringFailed(f"{node.name}: has no scale and zero point. This is a defect of edgeq: report the model.")
    limits = np.iinfo(zero_point.dtype)
    steps = np.rint(values.astype(np.float32) / scale).astype(np.float64) + float(zero_point)
    codes: NDArray[np.generic] = np.clip(steps, limits.min, limits.max).astype(zero_point.dtype)
    return codes


def _drop_output_dequantizer(graph: ir.Graph) -> None:
    """Remove the last DequantizeLinear, so that the graph's output is the quantised vector, uint16."""
    output = graph.outputs[0]
    dequantize = made_by(output, "DequantizeLinear")
    codes = dequantize.inputs[0] if dequantize is not None else None
    if dequantize is None or codes is None:
        raise LoweringFailed(f"{output.name} has no codes. This is a defect of edgeq: please report the model.")
    name, shape = output.name, output.shape
    graph.outputs[0] = codes
    graph.remove(dequantize, safe=True)
    codes.name, codes.shape, codes.dtype = name, shape, ir.DataType.UINT16
