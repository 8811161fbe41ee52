"""Remove Expand where the reader broadcasts anyway."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, dims, readers, replace_uses
from edgeq.graph.operators import BROADCASTING


def drop_expand(model: ir.Model) -> Rewrites:
    """Remove `Expand` when every reader broadcasts it against a value of the expanded shape.

    Before::

        norm[batch, 1] ─ Expand([batch, dim]) ─ Div(pooled[batch, dim], ·)

    After::

        norm[batch, 1] ─ Div(pooled[batch, dim], ·)
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Expand":
            continue
        expanded = node.outputs[0]
        source = node.inputs[0]
        shape = dims(expanded)
        if source is None or not readers(expanded):
            continue
        if (
            shape is None
            or expanded.is_graph_output()
            or not all(_is_covered(use, expanded, shape) for use in readers(expanded))
        ):
            near.append(f"{node.name}: a reader does not broadcast against the shape {shape}")
            continue
        replace_uses(expanded, source)
        count += 1
    return Rewrites(count, tuple(near))


def _is_covered(reader: ir.Node, expanded: ir.Value, shape: list[int | str | None]) -> bool:
    if reader.op_type not in BROADCASTING or None in shape:
        return False
    others = [value for value in reader.inputs if value is not expanded]
    return any(dims(value) == shape for value in others)
