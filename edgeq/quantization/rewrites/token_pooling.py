"""Write poolings that pick tokens with operators that integer-only runtimes have, the FP32 function kept.

A mean is a product with the tokens' shares already (`edgeq.passes.pool_by_matmul`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, constant, made_by, readers, replace_uses, required, scalar
from edgeq.graph.roles import Role
from edgeq.passes.pool_by_matmul import POOLING

_ON_THE_WAY = ("Cast", "Equal", "Expand", "Reshape", "Unsqueeze")  # between the mask and where padding is filled


def cap_padding(graph: ir.Graph, where: ir.Node) -> int:
    """Let a minimum hold padding down for max pooling, instead of a choice between tensors.

    Before::

        Where(mask == 0, -1e4, h) ─ ReduceMax(1)

    After::

        Min(h, (mask - 0.5) * 2e4) ─ ReduceMax(1)

    A minimum of codes with one scale needs no multiplication, and neither does a maximum.
    """
    mask, (is_padding, fill, hidden) = _mask_input(graph), where.inputs
    size, equal = scalar(fill), made_by(is_padding, "Equal")
    if mask is None or hidden is None or size is None or size >= 0.0 or equal is None:
        return 0
    if scalar(equal.inputs[1]) != 0.0 or _origin(is_padding) is not mask:
        return 0
    if not all(reader.op_type == "ReduceMax" for reader in readers(where.outputs[0])):
        return 0
    half, whole = _number(graph, where, "half", 0.5), _number(graph, where, "size", -2.0 * size)
    side = add_node(where, "Sub", [_column(graph, where, mask), half], f"{where.name}/side")
    cap = add_node(where, "Mul", [side, whole], f"{where.name}/cap")
    capped = add_node(where, "Min", [hidden, cap], f"{where.name}/capped")
    _replace(where, capped)
    return 1


def last_token(graph: ir.Graph, gather: ir.Node) -> int:
    """Let a product with ones and zeros pick the last token, as one with shares makes the mean.

    Before::

        GatherElements(h * mask, size - 1 - ArgMax(mask from its end))

    After::

        MatMul(mask * (CumSum(mask) == ReduceSum(mask)), h)
    """
    mask, masked = _mask_input(graph), made_by(gather.inputs[0], "Mul")
    position = gather.inputs[1]
    while (step := made_by(position, "Expand", "Unsqueeze", "Cast", "Reshape")) is not None:
        position = step.inputs[0]
    if mask is None or masked is None or not _counts_from_the_end(position):
        return 0
    hidden = next((value for value in masked.inputs if _origin(value) is not mask), None)
    if hidden is None or all(_origin(value) is not mask for value in masked.inputs):
        return 0
    name = f"{POOLING}/{gather.name}"
    axis = add_constant(graph, f"{name}/axis", np.array(1, np.int64))
    axes = add_constant(graph, f"{name}/axes", np.array([1], np.int64))
    seen = add_node(gather, "CumSum", [mask, axis], f"{name}/seen")
    count = add_node(gather, "ReduceSum", [mask, axes], f"{name}/count", {"keepdims": 1})
    is_last = add_node(gather, "Equal", [seen, count], f"{name}/is_last")
    whole = add_node(gather, "Cast", [is_last], f"{name}/last_or_padding", {"to": ir.DataType.INT64.value})
    last = add_node(gather, "Mul", [whole, mask], f"{name}/last")
    shares = add_node(gather, "Cast", [last], f"{name}/shares", {"to": ir.DataType.FLOAT.value})
    row = add_node(gather, "Unsqueeze", [shares, axes], f"{name}/weights")
    picked = add_node(gather, "MatMul", [row, hidden], f"{name}/picked", role=Role.POOLING)
    roles.give(required(picked.producer()), Role.PICKED_TOKEN)
    _replace(gather, picked)
    return 1


def _counts_from_the_end(position: ir.Value | None) -> bool:
    """Tell whether a position is the size minus what ArgMax finds in the mask read backwards."""
    outer = made_by(position, "Sub")
    inner = made_by(outer.inputs[0], "Sub") if outer is not None else None
    chosen = made_by(inner.inputs[1], "Where") if inner is not None else None
    found = made_by(chosen.inputs[2], "ArgMax") if chosen is not None else made_by(position, "ArgMax")
    backwards = made_by(found.inputs[0], "Slice") if found is not None else None
    steps = constant(backwards.inputs[4]) if backwards is not None and len(backwards.inputs) > 4 else None
    return steps is not None and steps.tolist() == [-1]


def _mask_input(graph: ir.Graph) -> ir.Value | None:
    return next((value for value in graph.inputs if value.name == "attention_mask"), None)


def _origin(value: ir.Value | None) -> ir.Value | None:
    while (node := made_by(value, *_ON_THE_WAY)) is not None:
        value = node.inputs[0]
    return value


def _column(graph: ir.Graph, before: ir.Node, mask: ir.Value) -> ir.Value:
    """Give the mask as float[batch, sequence, 1]."""
    axis = add_constant(graph, f"{before.name}/axis", np.array([2], np.int64))
    column = add_node(before, "Unsqueeze", [mask, axis], f"{before.name}/column")
    return add_node(before, "Cast", [column], f"{before.name}/mask", {"to": ir.DataType.FLOAT.value})


def _number(graph: ir.Graph, before: ir.Node, name: str, number: float) -> ir.Value:
    return add_constant(graph, f"{before.name}/{name}", np.array(number, np.float32))


def _replace(node: ir.Node, result: ir.Value) -> None:
    result.dtype, result.shape = ir.DataType.FLOAT, node.outputs[0].shape
    replace_uses(node.outputs[0], result)
