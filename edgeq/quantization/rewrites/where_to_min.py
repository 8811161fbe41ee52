"""Hold padding down for max pooling by a Min instead of a Where."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, made_by, readers, replace_uses, scalar
from edgeq.quantization.rewrites.pooling_mask import mask_input, origin


def where_to_min(model: ir.Model) -> Rewrites:
    """Replace the Where that fills padding before max pooling by a Min with a cap for each token.

    Before::

        Where(mask == 0, -1e4, h) ─ ReduceMax(1)

    After::

        Min(h, (mask - 0.5) * 2e4) ─ ReduceMax(1)

    A minimum of integers with one scale needs no multiplication, and neither does a maximum. Where the channels stand
    before the tokens, the maximum is over axis 2, and so lies the mask.
    """
    mask = mask_input(model.graph)
    count, near = 0, []
    for node in list(model.graph):
        equal = made_by(node.inputs[0], "Equal") if node.op_type == "Where" else None
        if mask is None or equal is None or scalar(equal.inputs[1]) != 0.0 or origin(node.inputs[0]) is not mask:
            continue
        fill, hidden = scalar(node.inputs[1]), node.inputs[2]
        if fill is None or fill >= 0.0 or hidden is None:
            near.append(f"{node.name}: fills padding with another value than a negative constant")
        elif not all(reader.op_type == "ReduceMax" for reader in readers(node.outputs[0])):
            near.append(f"{node.name}: read by something else than ReduceMax")
        elif (tokens := _axis_of_tokens(node)) is None:
            near.append(f"{node.name}: no maximum of three axes over tokens alone")
        else:
            _write_minimum(model.graph, node, mask, hidden, fill, tokens)
            count += 1
    return Rewrites(count, tuple(near))


def _axis_of_tokens(where: ir.Node) -> int | None:
    """Give the axis, 1 or 2, that all maxima of a tensor with three axes, as far as is known, are over."""
    shape, found = dims(where.outputs[0]), set[int]()
    for node in readers(where.outputs[0]):
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or axes.size != 1:
            return None
        found.add(int(axes.reshape(-1)[0]) % 3)
    has_three_axes = shape is None or len(shape) == 3
    return found.pop() if has_three_axes and len(found) == 1 and 0 not in found else None


def _write_minimum(graph: ir.Graph, where: ir.Node, mask: ir.Value, hidden: ir.Value, fill: float, tokens: int) -> None:
    half, whole = (
        add_constant(graph, f"{where.name}/{name}", np.array(number, np.float32))
        for name, number in (("half", 0.5), ("size", -2.0 * fill))
    )
    axis = add_constant(graph, f"{where.name}/axis", np.array([3 - tokens], np.int64))
    column = add_node(where, "Unsqueeze", [mask, axis], f"{where.name}/column")
    kept = add_node(where, "Cast", [column], f"{where.name}/mask", {"to": ir.DataType.FLOAT.value})
    side = add_node(where, "Sub", [kept, half], f"{where.name}/side")
    cap = add_node(where, "Mul", [side, whole], f"{where.name}/cap")
    capped = add_node(where, "Min", [hidden, cap], f"{where.name}/capped", like=where.outputs[0])
    replace_uses(where.outputs[0], capped)
