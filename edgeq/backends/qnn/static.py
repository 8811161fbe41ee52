"""Fix the shapes of a QDQ model for one bucket, with float or quantised inputs and outputs as the target asks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.backends.qnn.right_operands import fit_right_operands
from edgeq.errors import ConfigError, LoweringFailed
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import add_constant, constant, made_by, replace_uses, required
from edgeq.graph.evaluate import computed
from edgeq.graph.static_shapes import fix_shapes
from edgeq.records import Target

_INDEXED = ("Gather", "GatherElements")


def static(model: ir.Model, length: int, target: Target) -> onnx.ModelProto:
    """Give the model for one text of `length` tokens.

    Args:
        model: the QDQ model with dynamic shapes; edited in place.
        length: of the bucket, in tokens.
        target: whose inputs and outputs it has: int32 ids and mask in, uint16 vectors out, or int64 and float32; and
            whose version of the tensor processor decides what 16-bit products read.

    Raises:
        ConfigError: the bucket is longer than the model's table of positions.
        LoweringFailed: a shape is not known in advance.
    """
    short = too_few_positions(model.graph, length)
    if short:
        raise ConfigError(f"{target.name}: {short}")
    has_quantized_io = target.runtime["io"] == "quantized"
    if has_quantized_io:
        _drop_output_dequantizer(model.graph)
    _store_positions(model.graph, length)
    fit_right_operands(model.graph, int(target.runtime["htp_arch"]))
    return fix_shapes(model, length, ir.DataType.INT32 if has_quantized_io else ir.DataType.INT64)


def too_few_positions(graph: ir.Graph, length: int) -> str:
    """Say which bucket is longer than the model's table of positions, or give an empty string."""
    for node in graph:
        table = constant(node.inputs[0]) if node.op_type == "Slice" else None
        if table is None or table.ndim < 2 or not any(map(follows_from_sizes, node.inputs[1:])):
            continue
        if table.shape[-2] < length:
            return (
                f"buckets_tokens has {length}, but the model has {table.shape[-2]} positions "
                f"({str(node.inputs[0].name).partition('/')[0]}). "  # type: ignore[union-attr]
                f"Give buckets of at most {table.shape[-2]} tokens."
            )
    return ""


def _store_positions(graph: ir.Graph, length: int) -> None:
    """Replace what is quantised, or looked up by, and follows from the length alone, by a constant; equal ones are one.

    Rotations (RoPE), biases by distance, and causal and local masks are such.
    """
    stored: dict[tuple[str, bytes], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and follows_from_sizes(node.inputs[0]):
            old, array = node.outputs[0], _codes(node, _of_length(node.inputs[0], length))
        elif node.op_type in _INDEXED and follows_from_sizes(node.inputs[1]) and not _is_known(node.inputs[0]):
            old, array = required(node.inputs[1]), _of_length(node.inputs[1], length)
        else:
            continue
        key = (f"{array.dtype} {array.shape}", array.tobytes())
        if key not in stored:
            stored[key] = add_constant(graph, f"{old.name}/of_length", array)
        replace_uses(old, stored[key])


def _is_known(value: ir.Value | None) -> bool:
    """Tell whether a value is a constant, or follows from the length: what is looked up in it is stored as a whole."""
    return constant(value) is not None or follows_from_sizes(value)


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
