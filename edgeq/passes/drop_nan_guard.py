"""Remove what guards a softmax against rows without any key."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.attention_mask import is_mask
from edgeq.graph.edit import Rewrites, made_by, replace_uses, scalar


def drop_nan_guard(model: ir.Model) -> Rewrites:
    """Remove `Where(IsNaN(p), 0, p)` behind a softmax whose mask is finite.

    Before::

        scores ─ Add(finite mask) ─ Softmax ─┬─ IsNaN ─┐
                                             └─────── Where(·, 0, ·) ─ MatMul(values)

    After::

        scores ─ Add(finite mask) ─ Softmax ─ MatMul(values)
    """
    count, near = 0, []
    for node in list(model.graph):
        guard = made_by(node.inputs[0], "IsNaN") if node.op_type == "Where" else None
        if guard is None or guard.inputs[0] is not node.inputs[2] or scalar(node.inputs[1]) != 0.0:
            continue
        softmax = made_by(node.inputs[2], "Softmax")
        masked = made_by(softmax.inputs[0], "Add") if softmax is not None else None
        if softmax is None or masked is None or not any(map(is_mask, masked.inputs)):
            near.append(f"{node.name}: guards what is no softmax behind a finite mask")
            continue
        replace_uses(node.outputs[0], softmax.outputs[0])
        count += 1
    return Rewrites(count, tuple(near))
