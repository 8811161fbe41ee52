"""Fold the scale of looked-up embeddings into their table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, constant, is_read_once, made_by, replace_uses, scalar


def fold_table_scale(model: ir.Model) -> Rewrites:
    """Multiply the table instead of each row that is looked up.

    Before::

        Gather(table, input_ids) ─ Mul(c)

    After::

        Gather(c table, input_ids)
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Mul":
            continue
        position = next((at for at, value in enumerate(node.inputs) if scalar(value) is not None), -1)
        lookup = made_by(node.inputs[1 - position], "Gather") if position >= 0 else None
        table, factor = (constant(lookup.inputs[0]) if lookup is not None else None), scalar(node.inputs[position])
        if lookup is None or table is None or factor is None or table.dtype != np.float32:
            continue
        if not is_read_once(lookup.outputs[0]):
            near.append(f"{node.name}: the rows are read elsewhere too")
            continue
        name = lookup.inputs[0].name if lookup.inputs[0] is not None else "table"
        scaled = add_constant(model.graph, f"{name}/scaled", table * np.float32(factor))
        lookup.replace_input_with(0, scaled)
        replace_uses(node.outputs[0], lookup.outputs[0])
        count += 1
    return Rewrites(count, tuple(near))
