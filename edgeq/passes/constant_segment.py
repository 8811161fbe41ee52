"""Replace the lookup of segment 0 by its row."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, constant, made_by, readers, replace_uses
from edgeq.graph.operators import SAME_VALUES

_SPREADING = SAME_VALUES | {"ConstantOfShape"}


def constant_segment(model: ir.Model) -> Rewrites:
    """Replace a `Gather` whose indices are one constant, expanded, by the row it looks up.

    Before::

        Expand(0, shape) ─ Gather(token_type_embeddings) ─ Add

    After::

        token_type_embeddings[0] ─ Add

    A single text has segment 0 throughout, so the input `token_type_ids` is not needed either. The index may also be
    cut out of, or looked up in, a buffer that holds one value throughout.
    """
    count, near = 0, []
    for node in list(model.graph):
        expand = made_by(node.inputs[1], *_SPREADING) if node.op_type == "Gather" else None
        if expand is None:
            continue
        table = constant(node.inputs[0])
        index = _only_value(node.inputs[1])
        if table is None or index is None:
            near.append(f"{node.name}: looks up a chosen index, but table or index is not constant")
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


def _only_value(value: ir.Value | None) -> float | None:
    """Give the one number that a value holds throughout, whatever part of a constant it is, and however spread."""
    while (part := made_by(value, *_SPREADING)) is not None:
        if part.op_type == "ConstantOfShape":
            return 0.0 if "value" not in part.attributes else float(part.attributes["value"].as_tensor().numpy()[0])
        value = part.inputs[0]
    array = constant(value)
    if array is None or array.size == 0 or not np.all(array == array.reshape(-1)[0]):
        return None
    return float(array.reshape(-1)[0])
