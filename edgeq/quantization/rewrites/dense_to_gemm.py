"""Write the products of one row a text, such as Dense layers behind the pooling, as Gemm."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_node, dims, replace_uses, required
from edgeq.graph.linear import Linear
from edgeq.graph.roles import Role


def dense_to_gemm(model: ir.Model, statistics: Observed) -> Rewrites:
    """Replace MatMul and Add on [batch, channels] by a Gemm, as `edgeq.passes.matmul_to_gemm` does for tokens.

    Before::

        x[batch, channels] ─ MatMul(W) ─ Add(b)

    After::

        x ─ Gemm(W, b)
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        linear, shape = Linear.of(node), dims(node.inputs[0])
        if linear is None or shape is None or len(shape) != 2:
            continue
        inputs, end = list(map(required, node.inputs)), linear.end
        if linear.add is not None:
            inputs.append(required(linear.add.inputs[linear.bias_position]))
        result = add_node(node, "Gemm", inputs, str(node.name), like=end.outputs[0], role=Role.TEXT_PRODUCT)
        roles.hand_over(node, required(result.producer()))
        result.name = f"{end.outputs[0].name}/gemm"
        if str(end.outputs[0].name) in statistics:
            statistics[result.name] = statistics[str(end.outputs[0].name)]
        replace_uses(end.outputs[0], result)
        for old in dict.fromkeys((end, node)):
            graph.remove(old, safe=True)
        count += 1
    return Rewrites(count)
