"""Add a bias of zeros behind weight products that have none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, add_node, insert_after, readers
from edgeq.graph.linear import Linear
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
        linear, output = Linear.of(node), node.outputs[0]
        if linear is None or linear.add is not None or linear.weight.ndim != 2:
            continue
        if roles.has(node, Role.OUTLIER_BRANCH) or output.is_graph_output():
            continue
        name = str(output.name)
        zeros = add_constant(graph, f"{node.name}/zeros", np.zeros(linear.weight.shape[1], np.float32))
        first = next(each for each in graph if each in set(readers(output)))
        total = add_node(first, "Add", [output, zeros], f"{node.name}/biased", like=output)
        insert_after(output, total)
        output.name, total.name = f"{name}/product", name
        count += 1
    return Rewrites(count)
