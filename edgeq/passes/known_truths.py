"""Drop conditions that always hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, constant, dims, made_by, replace_uses
from edgeq.graph.operators import SAME_VALUES


def known_truths(model: ir.Model) -> Rewrites:
    """Replace `And` with what is always true, and `Or` with what is always false, by the other operand.

    Before::

        ConstantOfShape(false) ─ Or ─ And ─ mask
        position <= position ──┘     │
        Expand(true) ────────────────┘

    After::

        position <= position ─ mask

    torch exports such constant conditions for masks that transformers composes from several mask functions.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type not in ("And", "Or"):
            continue
        for position, value in enumerate(node.inputs):
            other = node.inputs[1 - position]
            if truth(value) is not (node.op_type == "And") or other is None:
                continue
            if dims(other) is None or dims(other) != dims(node.outputs[0]):
                near.append(f"{node.name}: an operand decides nothing, but the other has another shape")
                continue
            replace_uses(node.outputs[0], other)
            count += 1
            break
    return Rewrites(count, tuple(near))


def truth(value: ir.Value | None) -> bool | None:
    """Tell whether a condition holds everywhere (True) or nowhere (False), or give None."""
    while (step := made_by(value, *SAME_VALUES)) is not None:
        value = step.inputs[0]
    array = constant(value)
    if array is not None:
        return bool(array.reshape(-1)[0]) if array.size and np.all(array == array.reshape(-1)[0]) else None
    filled = made_by(value, "ConstantOfShape")
    if filled is not None:
        return "value" in filled.attributes and bool(filled.attributes["value"].as_tensor().numpy().reshape(-1)[0])
    node = made_by(value, "And", "Or")
    if node is None:
        return None
    decides = node.op_type == "Or"
    known = [truth(item) for item in node.inputs]
    return decides if decides in known else (None if None in known else not decides)
