"""Write the repeated keys and values of grouped-query attention (GQA) as one Gather of heads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, made_by, replace_uses


def repeat_kv_by_gather(model: ir.Model) -> Rewrites:
    """Replace the Unsqueeze, Expand and Reshape that repeat each head by a Gather.

    Before::

        x[batch, heads, sequence, size] ─ Unsqueeze(2) ─ Expand(times) ─ Reshape[0, heads * times, -1, size]

    After::

        x ─ Gather(axis 1, [0, 0, 1, 1, ...])
    """
    count, near = 0, []
    for node in list(model.graph):
        expand = made_by(node.inputs[0], "Expand") if node.op_type == "Reshape" else None
        spread = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
        x = spread.inputs[0] if spread is not None else None
        before, after = dims(x), dims(node.outputs[0])
        if spread is None or x is None or before is None or after is None or len(before) != 4:
            continue
        axes = constant(spread.inputs[1])
        heads, wanted = before[1], after[1] if len(after) == 4 else None
        if axes is None or axes.reshape(-1).tolist() != [2] or not isinstance(heads, int):
            continue
        if not isinstance(wanted, int) or wanted % heads or before[3] != after[3]:
            near.append(f"{node.name}: repeats heads, but to a shape that is no multiple of theirs")
            continue
        order = add_constant(model.graph, f"heads_{heads}_of_{wanted}", np.repeat(np.arange(heads), wanted // heads))
        result = add_node(node, "Gather", [x, order], f"{node.name}/shared", {"axis": 1}, like=node.outputs[0])
        replace_uses(node.outputs[0], result)
        count += 1
    return Rewrites(count, tuple(near))
