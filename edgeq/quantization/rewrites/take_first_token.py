"""Take the first token by a Slice at position 0."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, made_by, replace_uses


def take_first_token(model: ir.Model) -> Rewrites:
    """Replace the lookup of the first token that the mask keeps by a Slice.

    Before::

        attention_mask ─ ArgMax ─ Unsqueeze ─ Expand ─ GatherElements(h)

    After::

        h ─ Slice(0:1, axis 1)

    Static artifacts are given texts that begin at position 0, never padded left. A lookup by anything else stays.
    """
    count = 0
    for node in list(model.graph):
        found = node.inputs[1] if node.op_type == "GatherElements" else None
        while (step := made_by(found, "Expand", "Unsqueeze", "Cast", "Reshape")) is not None:
            found = step.inputs[0]
        if made_by(found, "ArgMax") is None or node.inputs[0] is None:
            continue
        numbers = {"start": 0, "end": 1, "axis": 1}
        ends = [
            add_constant(model.graph, f"{node.name}/{name}", np.array([number], np.int64))
            for name, number in numbers.items()
        ]
        first = add_node(node, "Slice", [node.inputs[0], *ends], f"{node.name}/first", like=node.outputs[0])
        replace_uses(node.outputs[0], first)
        count += 1
    return Rewrites(count)
