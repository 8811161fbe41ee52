"""Write the shapes of Reshape as constants."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, constant, dims, fix_shape


def constant_reshape(model: ir.Model) -> Rewrites:
    """Replace a computed shape of `Reshape` by a constant with 0 for kept and -1 for one inferred dimension.

    Before::

        Shape(attention_mask) ─ Squeeze ─ Concat(batch, sequence, -1, 32) ─ Reshape

    After::

        Reshape(·, [0, 0, 12, 32])
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Reshape" or constant(node.inputs[1]) is not None:
            continue
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        shape = _shape(before, after)
        if shape is None:
            near.append(f"{node.name}: the shape {after} does not follow from {before}")
            continue
        fix_shape(model.graph, node, shape)
        count += 1
    return Rewrites(count, tuple(near))


def _shape(before: list[int | str | None] | None, after: list[int | str | None] | None) -> list[int] | None:
    if before is None or after is None:
        return None
    shape: list[int] = []
    for position, dim in enumerate(after):
        if isinstance(dim, int):
            shape.append(dim)
        elif dim is not None and position < len(before) and before[position] == dim:
            shape.append(0)
        else:
            shape.append(-1)
    return shape if shape.count(-1) <= 1 else None
