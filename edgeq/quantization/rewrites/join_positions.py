"""Add a constant row to the table of positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import add_constant, constant, made_by
from edgeq.graph.linear import bias_of


def join_positions(graph: ir.Graph) -> None:
    """Add a constant row, such as the token type's, to the table of positions."""
    for node in list(graph):
        sliced = made_by(node.inputs[1], "Slice") if node.op_type == "Add" else None
        first = made_by(node.inputs[0], "Add") if sliced is not None else None
        table = constant(sliced.inputs[0]) if sliced is not None else None
        row = bias_of(first) if first is not None else None
        if sliced is None or first is None or table is None or row is None or row[1].ndim > 1:
            continue
        name = f"{sliced.inputs[0].name}/joined"  # type: ignore[union-attr]
        sliced.replace_input_with(0, add_constant(graph, name, (table + row[1]).astype(np.float32)))
        node.replace_input_with(0, first.inputs[1 - row[0]])
