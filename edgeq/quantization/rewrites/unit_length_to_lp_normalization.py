"""Write the division of a vector by its length as LpNormalization, which Hexagon's tensor unit has."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph.edit import Rewrites, add_node, made_by, replace_uses


def unit_length_to_lp_normalization(model: ir.Model, statistics: Observed) -> Rewrites:
    """Replace a Div by ReduceL2 by one LpNormalization.

    Before::

        x ─┬─ ReduceL2 ─ Clip ─┬─ Div
           └───────────────────┘

    After::

        x ─ LpNormalization
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        clipped = made_by(node.inputs[1], "Clip", "Max", "ReduceL2") if node.op_type == "Div" else None
        while clipped is not None and clipped.op_type != "ReduceL2":
            clipped = made_by(clipped.inputs[0], "ReduceL2")
        x = node.inputs[0] if clipped is not None else None
        if clipped is None or x is None or clipped.inputs[0] is not x:
            continue
        attributes = {"axis": -1, "p": 2}
        result = add_node(node, "LpNormalization", [x], f"{node.name}/unit_length", attributes, like=node.outputs[0])
        replace_uses(node.outputs[0], result)
        graph.remove(node, safe=True)
        count += 1
    return Rewrites(count)
