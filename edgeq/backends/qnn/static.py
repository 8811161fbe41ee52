"""Fix the shapes of a QDQ model: one text of one length, as the HTP compiler takes it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.errors import LoweringFailed
from edgeq.passes.graph import add_constant, checked, constant, made_by, replace_uses

_FOLDED = frozenset({"Concat", "Gather", "Slice", "Squeeze", "Unsqueeze"})


def static(model: ir.Model, length: int, has_quantized_io: bool) -> onnx.ModelProto:
    """Give the model for one text of `length` tokens; shapes and rows of the table of positions become constants.

    Args:
        model: the QDQ model with dynamic shapes; edited in place.
        length: of the bucket, in tokens.
        has_quantized_io: int32 ids and mask in, codes out; else int64 and float.

    Raises:
        LoweringFailed: a shape is not known in advance.
    """
    graph = model.graph
    for item in graph.inputs:
        item.shape = ir.Shape([1, length])
        item.dtype = ir.DataType.INT32 if has_quantized_io else ir.DataType.INT64
    for node in list(graph):
        array = _folded(node)
        if array is not None:
            replace_uses(node.outputs[0], add_constant(graph, str(node.outputs[0].name), array))
            graph.remove(node, safe=True)
    unknown = [str(node.name) for node in graph if node.op_type == "Reshape" and constant(node.inputs[1]) is None]
    if unknown:
        raise LoweringFailed(f"{', '.join(unknown)}: shape is computed; HTP takes constant shapes. Report the model.")
    if has_quantized_io:
        _give_codes(graph)
    for value in (value for node in graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    output = graph.outputs[0]
    output.shape = ir.Shape([1, *list(output.shape or ())[1:]])
    RemoveUnusedNodesPass()(model)
    return checked(model)


def _folded(node: ir.Node) -> NDArray[np.generic] | None:
    """Evaluate a node that reads constants only, or the shape of an input."""
    if node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input():
        shape = np.array(node.inputs[0].shape.numpy() if node.inputs[0].shape is not None else (), np.int64)
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        return shape[start:end]
    arrays = {str(value.name): constant(value) for value in node.inputs if value is not None}
    if node.op_type not in _FOLDED or any(array is None for array in arrays.values()):
        return None
    (array,) = ReferenceEvaluator(ir.to_proto(node)).run(None, arrays)
    return np.asarray(array)


def _give_codes(graph: ir.Graph) -> None:
    """Let the graph's output be the codes of the vector."""
    output = graph.outputs[0]
    dequantize = made_by(output, "DequantizeLinear")
    codes = dequantize.inputs[0] if dequantize is not None else None
    if dequantize is None or codes is None:
        raise LoweringFailed(f"{output.name} has no codes. This is a defect of edgeq: please report the model.")
    name, shape = output.name, output.shape
    graph.outputs[0] = codes
    graph.remove(dequantize, safe=True)
    codes.name, codes.shape, codes.dtype = name, shape, ir.DataType.UINT16
