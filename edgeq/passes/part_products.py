"""Take apart a product whose output is taken apart behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, readers, replace_uses


@dataclass(frozen=True)
class _Part:
    """Hold which columns of a product one reader takes, and the value that it makes of them."""

    first: int
    last: int
    value: ir.Value
    shape: tuple[int, ...] | None  # of the Reshape behind the part, where there is one


def part_products(model: ir.Model) -> Rewrites:
    """Give every part of a product a weight of its own.

    Before::

        x ─ MatMul(W) ─ Add(b) ─ Split ─┬─ gate
                                        └─ value

    After::

        x ─┬─ MatMul(W[:, :n]) ─ Add(b[:n]) ─ gate
           └─ MatMul(W[:, n:]) ─ Add(b[n:]) ─ value

    The parts may also be slices of the last axis, or slices of an axis that a `Reshape` makes of it (query, key and
    value). Parts differ in size and in what reads them: a scale or a range for all of them fits none.
    """
    count, near = 0, []
    for node in list(model.graph):
        weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.ndim != 2:
            continue
        following = readers(node.outputs[0])
        add = following[0] if len(following) == 1 and following[0].op_type == "Add" else None
        bias = next((array for value in add.inputs if (array := constant(value)) is not None), None) if add else None
        end = add.outputs[0] if add is not None and bias is not None else node.outputs[0]
        parts = _parts(end, weight.shape[1])
        if parts is None:
            continue
        if end.is_graph_output() or (bias is not None and bias.shape != (weight.shape[1],)):
            near.append(f"{node.name}: its parts, or its bias, are used as a whole too")
            continue
        for number, part in enumerate(parts):
            _write(model.graph, node, part, weight, bias if end is not node.outputs[0] else None, number)
        count += 1
    return Rewrites(count, tuple(near))


def _write(
    graph: ir.Graph, node: ir.Node, part: _Part, weight: np.ndarray, bias: np.ndarray | None, number: int
) -> None:
    stem, columns = f"{node.name}/part_{number}", slice(part.first, part.last)
    before = part.value.producer()
    if before is None or node.inputs[0] is None:
        raise ValueError(f"{node.name}: a part of it is made by nobody")
    stored = add_constant(graph, f"{stem}.weight", np.ascontiguousarray(weight[:, columns]))
    value = add_node(before, "MatMul", [node.inputs[0], stored], stem)
    whole = node.outputs[0].shape
    shape = ir.Shape([*list(whole)[:-1], part.last - part.first]) if whole is not None else None
    value.shape, value.dtype = shape, ir.DataType.FLOAT
    if bias is not None:
        value = add_node(before, "Add", [value, add_constant(graph, f"{stem}.bias", bias[columns])], f"{stem}.biased")
        value.shape, value.dtype = shape, ir.DataType.FLOAT
    if part.shape is not None:
        target = add_constant(graph, f"{stem}/shape", np.array(part.shape, np.int64))
        value = add_node(before, "Reshape", [value, target], f"{stem}/heads")
        value.shape, value.dtype = part.value.shape, ir.DataType.FLOAT
    replace_uses(part.value, value)


def _parts(end: ir.Value, width: int) -> list[_Part] | None:
    """Give the parts if every reader of a value takes some of its columns, else None."""
    found: list[_Part] = []
    for node in readers(end):
        made = _columns(node, width) if node.op_type != "Reshape" else _blocks(node)
        if made is None:
            return None
        found += made
    return found if len(found) > 1 else None


def _columns(node: ir.Node, width: int) -> list[_Part] | None:
    """Give the columns that a Split or a Slice of the last axis takes."""
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    if node.op_type == "Split":
        sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        count = len(node.outputs)
        each = [width // count] * count if sizes is None else [int(size) for size in sizes]
        if node.attributes["axis"].as_int() not in (-1, rank - 1) or sum(each) != width:
            return None
        ends = np.cumsum(each).tolist()
        return [_Part(end - size, end, value, None) for size, end, value in zip(each, ends, node.outputs, strict=True)]
    bounds = _bounds(node, width, rank - 1)
    return None if bounds is None else [_Part(*bounds, node.outputs[0], None)]


def _bounds(node: ir.Node, size: int, axis: int) -> tuple[int, int] | None:
    """Give where a Slice of one axis with step 1 begins and ends."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    numbers = [constant(value) for value in node.inputs[1:]]
    if any(item is None or item.size != 1 for item in numbers):
        return None
    first, last, place, *step = (int(item.reshape(-1)[0]) for item in numbers if item is not None)
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    if place % max(rank, 1) != axis or step not in ([], [1]):
        return None
    begin, end, _ = slice(first, last).indices(size)
    return begin, end


def _blocks(reshape: ir.Node) -> list[_Part] | None:
    """Give the blocks of columns that are taken one by one of the axis that a Reshape puts before heads."""
    target, shape = constant(reshape.inputs[1]), dims(reshape.outputs[0])
    if target is None or shape is None or len(shape) != 5 or target.tolist()[:2] != [0, 0]:
        return None
    count, *rest = (int(size) for size in target.tolist()[2:])
    width = int(np.prod(rest))
    found = []
    for node in readers(reshape.outputs[0]):
        bounds = _bounds(node, count, 2)
        squeeze = readers(node.outputs[0])
        if bounds is None or bounds[1] - bounds[0] != 1 or len(squeeze) != 1 or squeeze[0].op_type != "Squeeze":
            return None
        axes = constant(squeeze[0].inputs[1]) if len(squeeze[0].inputs) > 1 else None
        if axes is None or axes.size != 1 or int(axes.reshape(-1)[0]) % 5 != 2 or width < 0:
            return None
        found.append(_Part(bounds[0] * width, bounds[1] * width, squeeze[0].outputs[0], (0, 0, *rest)))
    return found
