"""Decompose RMSNorm into the operators that a decomposed LayerNormalization has, without centring."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites
from edgeq.graph.rms_norm import root_mean_square
from edgeq.quantization.rewrites.norm_parts import (
    drop_unread,
    graph_of,
    inverse_length,
    normalized_and_gained,
    take_place,
)


def decompose_rms_norm(model: ir.Model) -> Rewrites:
    """Replace x / sqrt(mean(x²) + eps) · gain, in whatever operators `root_mean_square` finds it.

    Before::

        x ─┬─ Mul(itself) ─ ReduceMean ─ Add(eps) ─ Sqrt ─ Reciprocal ─ Mul ─ Mul(gain)
           └────────────────────────────────────────────────────────────┘

    After::

        x ─┬─ ReduceSumSquare ─ Add(n eps) ─ Sqrt ─ Reciprocal ─ Mul ─ Mul(gain √n)
           └─────────────────────────────────────────────────────┘
    """
    count = 0
    for node in list(model.graph):
        found = root_mean_square(node) if node.op_type == "Mul" else None
        if found is None:
            continue
        inverse = inverse_length(node, found.x, found.gain.size * found.epsilon)
        result = normalized_and_gained(node, found.x, inverse, found.gain)
        above, graph = list(node.inputs), graph_of(node)
        take_place(node, result)
        for value in above:
            drop_unread(graph, value)
        count += 1
    return Rewrites(count)
