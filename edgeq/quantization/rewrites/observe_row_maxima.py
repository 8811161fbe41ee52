"""Let calibration observe the largest attention score of each row."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_node
from edgeq.quantization.rewrites.norm_parts import last_axis

ROW_MAXIMUM = "/row_maximum"  # ends the names of tensors that exist to be observed only


def observe_row_maxima(model: ir.Model) -> Rewrites:
    """Add a ReduceMax, which nothing reads, to the scores before every Softmax.

    Before::

        scores ─ Softmax

    After::

        scores ─┬─ Softmax
                └─ ReduceMax(-1)

    The smallest maximum of a row tells how far down an 8-bit range of scores must reach.
    """
    count = 0
    for node in list(model.graph):
        scores = node.inputs[0] if node.op_type == "Softmax" else None
        if scores is not None:
            add_node(node, "ReduceMax", [scores, last_axis(model.graph)], f"{scores.name}{ROW_MAXIMUM}")
            count += 1
    return Rewrites(count)
