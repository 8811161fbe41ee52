"""Replace the lookup of segment 0 by its row."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.passes.graph import Rewrites, add_constant, constant, made_by, readers, replace_uses, scalar


def constant_segment(model: ir.Model) -> Rewrites:
    """Replace a `Gather` whose indices are one constant, expanded, by the row it looks up.

    Before::

        Expand(0, shape) ─ Gather(token_type_embeddings) ─ Add

    After::

        token_type_embeddings[0] ─ Add

    A single text has segment 0 throughout, so the input `token_type_ids` is not needed either.
    """
    count, near = 0, []
    for node in list(model.graph):
        expand = made_by(node.inputs[1], "Expand", "ConstantOfShape") if node.op_type == "Gather" else None
        if expand is None:
            continue
        table = constant(node.inputs[0])
        index = scalar(expand.inputs[0]) if expand.op_type == "Expand" else 0.0
        if table is None or index is None:
            near.append(f"{node.name}: looks up an expanded index, but table or index is not constant")
            continue
        if not all(reader.op_type == "Add" for reader in readers(node.outputs[0])):
            near.append(f"{node.name}: the row is read by something that may not broadcast it")
            continue
        row = add_constant(
            model.graph, f"{node.inputs[0].name if node.inputs[0] else 'segment'}/row", np.asarray(table[int(index)])
        )
        replace_uses(node.outputs[0], row)
        count += 1
    return Rewrites(count, tuple(near))
