"""Fix the shapes of a QDQ model for one bucket, with float or quantised inputs and outputs as the target asks."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from edgeq.errors import LoweringFailed
from edgeq.graph.edit import made_by
from edgeq.graph.static_shapes import fix_shapes


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
    return fix_shapes(model, length, ir.DataType.INT32 if has_quantized_io else ir.DataType.INT64)


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
