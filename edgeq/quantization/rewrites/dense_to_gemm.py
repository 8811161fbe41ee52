"""Write the products of one row a text, such as Dense layers behind the pooling, as Gemm."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_node, constant, dims, readers, replace_uses, required
from edgeq.graph.linear import bias_of
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
        shape = dims(node.inputs[0]) if node.op_type == "MatMul" else None
        if shape is None or len(shape) != 2 or constant(node.inputs[1]) is None:
            continue
        following = readers(node.outputs[0])
        add = following[0] if len(following) == 1 and following[0].op_type == "Add" else None
        bias = bias_of(add) if add is not None else None
        inputs, end = list(map(required, node.inputs)), node
        if add is not None and bias is not None:
            inputs, end = [*inputs, required(add.inputs[bias[0]])], add
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
