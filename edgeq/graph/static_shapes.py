"""Fix the shapes of a model to [1, length], as compilers for NPUs need them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.errors import LoweringFailed
from edgeq.graph import operators, roles
from edgeq.graph.edit import add_constant, checked, constant, replace_uses
from edgeq.graph.evaluate import of_constants

_FOLDED = operators.of_kind("layout", "selection") | {"Concat"}  # without what repeats: results stay small


def fix_shapes(model: ir.Model, length: int, ids: ir.DataType = ir.DataType.INT64) -> onnx.ModelProto:
    """Fix the inputs to int[1, length], and fold Shape and what follows from it, rows of positions too, into constants.

    Args:
        model: with dynamic shapes and one output; edited in place.
        length: of the bucket, in tokens.
        ids: the dtype of token ids and mask.

    Raises:
        LoweringFailed: a shape is not known in advance.
    """
    graph = model.graph
    for item in graph.inputs:
        item.shape = ir.Shape([1, length])
        item.dtype = ids
    for node in list(graph):
        array = _folded(node)
        if array is not None:
            replace_uses(node.outputs[0], add_constant(graph, str(node.outputs[0].name), array))
            graph.remove(node, safe=True)
    unknown = [str(node.name) for node in graph if node.op_type == "Reshape" and constant(node.inputs[1]) is None]
    if unknown:
        raise LoweringFailed(f"{', '.join(unknown)}: shape is computed; NPUs take constant shapes. Report the model.")
    for value in (value for node in graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    output = graph.outputs[0]
    output.shape = ir.Shape([1, *list(output.shape or ())[1:]])
    RemoveUnusedNodesPass()(model)
    return roles.strip(checked(model))


def _folded(node: ir.Node) -> NDArray[np.generic] | None:
    """Evaluate a node that reads constants only, or the shape of an input."""
    if node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].is_graph_input():
        shape = np.array(node.inputs[0].shape.numpy() if node.inputs[0].shape is not None else (), np.int64)
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        return shape[start:end]
    return of_constants(node) if node.op_type in _FOLDED else None
