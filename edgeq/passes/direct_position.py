"""Slice the position table instead of looking positions up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, made_by, replace_uses, scalar


def direct_position(model: ir.Model) -> Rewrites:
    """Replace `Gather(table, Slice(0..n-1))` by `Slice(table)`.

    Before::

        position_ids[1, n] ─ Slice(0, sequence) ─ Gather(position_embeddings[n, dim])

    After::

        position_embeddings[1, n, dim] ─ Slice(0, sequence)
    """
    count, near = 0, []
    for node in list(model.graph):
        cut = made_by(node.inputs[1], "Slice") if node.op_type == "Gather" else None
        if cut is None:
            continue
        table, positions = constant(node.inputs[0]), constant(cut.inputs[0])
        if table is None or positions is None:
            near.append(f"{node.name}: looks up a slice, but table or positions are not constant")
            continue
        flat = positions.reshape(-1)
        is_rising = positions.ndim == 2 and positions.shape[0] == 1 and bool(np.all(np.diff(flat) == 1))
        start, axis = scalar(cut.inputs[1]), scalar(cut.inputs[3]) if len(cut.inputs) > 3 else 0.0
        if not is_rising or start != 0 or axis != 1:
            near.append(f"{node.name}: positions are not 0, 1, 2, … cut along axis 1")
            continue
        first = int(flat[0])
        rows = np.ascontiguousarray(table[None, first : first + len(flat)])
        name = node.inputs[0].name if node.inputs[0] is not None else None
        sliced = add_node(
            node,
            "Slice",
            [
                add_constant(model.graph, f"{name}/rows", rows),
                *(value for value in cut.inputs[1:] if value is not None),
            ],
            f"{name}/slice",
        )
        replace_uses(node.outputs[0], sliced)
        count += 1
    return Rewrites(count, tuple(near))
