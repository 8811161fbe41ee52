"""Remove Reshape that changes nothing."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, dims, replace_uses


def drop_reshape(model: ir.Model) -> Rewrites:
    """Let readers of a `Reshape` to the same shape read what it reads.

    Before::

        input_ids[batch, sequence] ─ Reshape([-1, sequence]) ─ Gather(table)

    After::

        input_ids[batch, sequence] ─ Gather(table)
    """
    count, near = 0, []
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Reshape" else None
        before, after = dims(source), dims(node.outputs[0])
        if source is None or before is None or before != after:
            continue
        if None in before or node.outputs[0].is_graph_output():
            near.append(f"{node.name}: its shape has an axis without a name, or is the graph's output")
            continue
        replace_uses(node.outputs[0], source)
        count += 1
    return Rewrites(count, tuple(near))
