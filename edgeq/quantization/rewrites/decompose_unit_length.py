"""Decompose the division of a vector by its length into the operators that integer-only runtimes have."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_node, constant, made_by
from edgeq.quantization.rewrites.norm_parts import inverse_length, take_place


def decompose_unit_length(model: ir.Model) -> Rewrites:
    """Replace every Div by ReduceL2 by a root and a product.

    Before::

        x ─┬─ ReduceL2 ─ Clip(least) ─┬─ Div
           └──────────────────────────┘

    After::

        x ─┬─ ReduceSumSquare ─ Add(least²) ─ Sqrt ─ Reciprocal ─ Mul
           └──────────────────────────────────────────────────────┘
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Div":
            continue
        x, length = node.inputs
        clipped = made_by(length, "Clip", "Max")
        norm = made_by(clipped.inputs[0], "ReduceL2") if clipped is not None else made_by(length, "ReduceL2")
        if x is None or norm is None or norm.inputs[0] is not x:
            continue
        least = constant(clipped.inputs[1]) if clipped is not None and len(clipped.inputs) > 1 else None
        floor = float(least.reshape(-1)[0]) ** 2 if least is not None else 0.0
        inverse = inverse_length(node, x, floor)
        whole = node.outputs[0]
        take_place(node, add_node(node, "Mul", [x, inverse], f"{whole.name}/primitives", like=whole))
        count += 1
    return Rewrites(count)
