"""Add a constant row to the table of positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph.edit import Rewrites, add_constant, constant, made_by, required
from edgeq.graph.linear import bias_of


def join_positions(model: ir.Model, statistics: Observed) -> Rewrites:
    """Add a constant row, such as the token type's embedding, to the table of positions.

    Before::

        words ─ Add(row) ─ Add ─ …
        Slice(positions) ──┘

    After::

        words ──────────────── Add ─ …
        Slice(positions + row) ┘
    """
    count = 0
    for node in list(model.graph):
        sliced = made_by(node.inputs[1], "Slice") if node.op_type == "Add" else None
        first = made_by(node.inputs[0], "Add") if sliced is not None else None
        table = constant(sliced.inputs[0]) if sliced is not None else None
        row = bias_of(first) if first is not None else None
        if sliced is None or first is None or table is None or row is None or row[1].ndim > 1:
            continue
        name = f"{required(sliced.inputs[0]).name}/joined"
        sliced.replace_input_with(0, add_constant(model.graph, name, (table + row[1]).astype(np.float32)))
        node.replace_input_with(0, first.inputs[1 - row[0]])
        count += 1
    return Rewrites(count)
