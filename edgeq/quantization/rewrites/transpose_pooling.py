"""Put the weights of a pooling on the right of its MatMul."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph.dataflow import mask_values
from edgeq.graph.edit import Rewrites, add_node, replace_uses


def transpose_pooling(model: ir.Model, statistics: Observed) -> Rewrites:
    """Transpose both operands of a MatMul whose left one follows from the attention mask, and exchange them.

    Before::

        weights[batch, 1, tokens], x[batch, tokens, channels] ─ MatMul

    After::

        xᵀ, weightsᵀ ─ MatMul ─ Transpose

    Hexagon's tensor unit reads the right operand of a product in 8 bits even where it has 16. All tokens of a text have
    one weight, so that rounding it does not turn the vector.
    """
    graph = model.graph
    of_mask = mask_values(graph)
    count = 0
    for node in list(graph):
        if node.op_type != "MatMul" or node.inputs[0] not in of_mask or node.inputs[1] is None:
            continue
        operands = [
            _transposed(node, value, f"{node.name}/{name}")
            for name, value in (("x", node.inputs[1]), ("shares", node.inputs[0]))
            if value is not None
        ]
        product = add_node(node, "MatMul", operands, f"{node.name}/turned")
        statistics[str(product.name)] = statistics[str(node.outputs[0].name)]
        back = _transposed(node, product, f"{node.name}/back")
        back.dtype, back.shape = ir.DataType.FLOAT, node.outputs[0].shape
        replace_uses(node.outputs[0], back)
        graph.remove(node, safe=True)
        count += 1
    return Rewrites(count)


def _transposed(before: ir.Node, value: ir.Value, name: str) -> ir.Value:
    return add_node(before, "Transpose", [value], name, {"perm": [0, 2, 1]})
