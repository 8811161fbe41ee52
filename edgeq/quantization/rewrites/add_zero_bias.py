"""Add a bias of zeros behind weight products that have none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, insert_after, is_read_once, readers
from edgeq.graph.linear import bias_of
from edgeq.graph.roles import Role


def add_zero_bias(model: ir.Model) -> Rewrites:
    """Add zeros to every MatMul with weights that no Add of a constant follows, for later rewrites to fold into.

    Before::

        x ─ MatMul(W) ─ …

    After::

        x ─ MatMul(W) ─ Add(0) ─ …

    The products of an outlier branch stay as they are.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
        output = node.outputs[0]
        if weight is None or weight.ndim != 2 or roles.has(node, Role.OUTLIER_BRANCH) or output.is_graph_output():
            continue
        following = readers(output)
        if is_read_once(output) and following[0].op_type == "Add" and bias_of(following[0]) is not None:
            continue
        name = str(output.name)
        zeros = add_constant(graph, f"{node.name}/zeros", np.zeros(weight.shape[1], np.float32))
        first = next(each for each in graph if each in set(following))
        total = add_node(first, "Add", [output, zeros], f"{node.name}/biased", like=output)
        insert_after(output, total)
        output.name, total.name = f"{name}/product", name
        count += 1
    return Rewrites(count)
