"""Write RMSNorm as ONNX's operator RMSNormalization, for HTP, which has one of its own."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node
from edgeq.graph.rms_norm import root_mean_square
from edgeq.quantization.rewrites.norm_parts import drop_unread, graph_of, take_place

OPSET = 23  # the first with RMSNormalization


def rms_norm_to_operator(model: ir.Model) -> Rewrites:
    """Replace x / sqrt(mean(x²) + eps) · gain, in whatever operators `root_mean_square` finds it, FP32, exactly.

    Before::

        x ─┬─ Mul(itself) ─ ReduceMean ─ Add(eps) ─ Sqrt ─ Reciprocal ─ Mul ─ Mul(gain)
           └────────────────────────────────────────────────────────────┘

    After, in opset 23::

        x ─ RMSNormalization(gain)
    """
    count = 0
    for node in list(model.graph):
        found = root_mean_square(node)
        if found is None:
            continue
        graph, output = graph_of(node), node.outputs[0]
        gain = add_constant(graph, f"{output.name}/gain", found.gain)
        attributes = {"axis": -1, "epsilon": found.epsilon}
        result = add_node(node, "RMSNormalization", [found.x, gain], f"{output.name}/norm", attributes, like=output)
        above = list(node.inputs)
        take_place(node, result)
        for value in above:
            drop_unread(graph, value)
        count += 1
    if count:
        model.graph.opset_imports[""] = max(OPSET, model.graph.opset_imports.get("", 0))
    return Rewrites(count)
