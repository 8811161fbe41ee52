"""Write RoPE's rotate_half as one Gather of channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, made_by, readers, replace_uses


def rotate_half_by_gather(model: ir.Model) -> Rewrites:
    """Replace rotate_half, `concat(-x2, x1)`, by a Gather; the sign goes to the sines that multiply it.

    Before::

        x ─┬─ Slice(h:) ─ Neg ─ Concat ─ Mul(sin)
           └─ Slice(:h) ────────┘

    After::

        x ─ Gather(last axis, [h .. d-1, 0 .. h-1]) ─ Mul(sin * [-1 .. -1, 1 .. 1])

    Moving values keeps their integers: a Neg and a Concat would round them to another scale.
    """
    count, near = 0, []
    for node in list(model.graph):
        x = _halves(node) if node.op_type == "Concat" else None
        if x is None:
            continue
        products = readers(node.outputs[0])
        if all(use.op_type == "Mul" and any(map(follows_from_sizes, use.inputs)) for use in products):
            _write_gather(model.graph, node, x, products)
            count += 1
        else:
            near.append(f"{node.name}: exchanged halves, read by something else than a product with positions")
    return Rewrites(count, tuple(near))


def _halves(node: ir.Node) -> ir.Value | None:
    """Give x where a Concat joins its second half, negated, and its first half along the last axis."""
    first, second = (node.inputs[0], node.inputs[1]) if len(node.inputs) == 2 else (None, None)
    negated, still = made_by(first, "Neg"), made_by(second, "Slice")
    turned = made_by(negated.inputs[0], "Slice") if negated is not None else None
    x, shape = (turned.inputs[0] if turned is not None else None), dims(node.outputs[0])
    if turned is None or still is None or x is None or still.inputs[0] is not x or shape is None:
        return None
    width = shape[-1]
    axis = node.attributes["axis"].as_int() % len(shape)
    if not isinstance(width, int) or width % 2 or axis != len(shape) - 1:
        return None
    half = width // 2
    is_split = _ends(still, axis, width) == (0, half) and _ends(turned, axis, width) == (half, width)
    return x if is_split else None


def _write_gather(graph: ir.Graph, node: ir.Node, x: ir.Value, products: list[ir.Node]) -> None:
    shape = dims(node.outputs[0])
    width = int(shape[-1] or 0) if shape is not None else 0
    half, axis = width // 2, node.attributes["axis"].as_int() % len(shape or ())
    order = add_constant(graph, f"halves_of_{width}", np.roll(np.arange(width), half).astype(np.int64))
    result = add_node(node, "Gather", [x, order], f"{node.name}/turned", {"axis": axis}, like=node.outputs[0])
    signs = add_constant(graph, f"signs_of_{width}", np.repeat(np.array([-1, 1], np.float32), half))
    for use in products:
        place = next(at for at, value in enumerate(use.inputs) if follows_from_sizes(value))
        angle = use.inputs[place]
        if angle is not None:
            signed = add_node(use, "Mul", [angle, signs], f"{use.name}/signed", like=angle)
            use.replace_input_with(place, signed)
    replace_uses(node.outputs[0], result)


def _ends(node: ir.Node, axis: int, width: int) -> tuple[int, int] | None:
    """Give where a Slice of the axis begins and ends."""
    numbers = [constant(value) for value in node.inputs[1:]]
    if any(item is None or item.size != 1 for item in numbers) or len(numbers) < 3:
        return None
    begin, end, place, *_ = (int(item.reshape(-1)[0]) for item in numbers if item is not None)
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 4
    return slice(begin, end).indices(width)[:2] if place % rank == axis else None
