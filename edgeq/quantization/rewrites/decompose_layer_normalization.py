"""Decompose LayerNormalization into the operators that integer-only runtimes have."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_node, constant, dims
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.norm_parts import (
    CENTRED,
    MEAN,
    graph_of,
    inverse_length,
    last_axis,
    normalized_and_gained,
    take_place,
)


def decompose_layer_normalization(model: ir.Model) -> Rewrites:
    """Replace every LayerNormalization over the last axis by means, squares, a root and products.

    Before::

        x ─ LayerNormalization(gain, bias)

    After::

        x ─┬─ ReduceMean ─ Sub ─┬─ ReduceSumSquare ─ Add(n eps) ─ Sqrt ─ Reciprocal ─ Mul ─ Mul(gain √n) ─ Add(bias)
           └────────────────┘   └──────────────────────────────────────────────────────┘
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "LayerNormalization":
            continue
        reason = _decompose(node)
        if reason:
            near.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Rewrites(count, tuple(near))


def _decompose(node: ir.Node) -> str:
    """Decompose one node, or say why it stays."""
    x, output, gain = node.inputs[0], node.outputs[0], constant(node.inputs[1])
    shape = dims(output)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if x is None or gain is None:
        return "its gain is computed"
    if shape is None or axis not in (-1, len(shape) - 1):
        return "normalises more than the last axis"
    if len(node.outputs) > 1:
        return "its mean or deviation is an output, too"
    name = str(output.name)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    axes = last_axis(graph_of(node))
    mean = add_node(node, "ReduceMean", [x, axes], f"{name}{MEAN}", like=output, width=1)
    centred = add_node(node, "Sub", [x, mean], f"{name}{CENTRED}", like=output)
    inverse = inverse_length(node, centred, gain.shape[-1] * epsilon)
    result = normalized_and_gained(node, centred, inverse, gain)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        result = add_node(node, "Add", [result, bias], f"{name}/primitives", like=output, role=Role.NORM_BIAS)
    take_place(node, result)
    return ""
