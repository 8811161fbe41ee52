"""Write what encoders do around attention with operators that integer-only runtimes have, the FP32 function kept.

Values that are moved keep their codes: halves that change places, heads that several queries share. Positions that are
counted from tokens become rows of a table, because texts begin at position 0 in static artifacts.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.edit import (
    add_constant,
    add_node,
    constant,
    dims,
    follows_from_sizes,
    is_read_once,
    made_by,
    readers,
    replace_uses,
)
from edgeq.graph.evaluate import computed
from edgeq.graph.linear import bias_of
from edgeq.graph.roles import Role

_PROBED = 7  # tokens on which positions are counted


def turned_halves(graph: ir.Graph, node: ir.Node) -> int:
    """Let halves change places in one lookup, and the sign go to what they are multiplied by.

    Before::

        x ─┬─ Slice(h:) ─ Neg ─ Concat ─ Mul(sin)
           └─ Slice(:h) ────────┘

    After::

        x ─ Gather(last axis, [h .. d-1, 0 .. h-1]) ─ Mul(sin * [-1 .. -1, 1 .. 1])
    """
    first, second = (node.inputs[0], node.inputs[1]) if len(node.inputs) == 2 else (None, None)
    negated, still = made_by(first, "Neg"), made_by(second, "Slice")
    turned = made_by(negated.inputs[0], "Slice") if negated is not None else None
    x, shape = (turned.inputs[0] if turned is not None else None), dims(node.outputs[0])
    if turned is None or still is None or x is None or still.inputs[0] is not x or shape is None:
        return 0
    width = shape[-1]
    axis = node.attributes["axis"].as_int() % len(shape)
    if not isinstance(width, int) or width % 2 or axis != len(shape) - 1:
        return 0
    half = width // 2
    if _ends(still, axis, width) != (0, half) or _ends(turned, axis, width) != (half, width):
        return 0
    products = readers(node.outputs[0])
    if not all(use.op_type == "Mul" and any(map(follows_from_sizes, use.inputs)) for use in products):
        return 0
    order = add_constant(graph, f"halves_of_{width}", np.roll(np.arange(width), half).astype(np.int64))
    result = add_node(node, "Gather", [x, order], f"{node.name}/turned", {"axis": axis})
    result.shape, result.dtype = node.outputs[0].shape, ir.DataType.FLOAT
    signs = add_constant(graph, f"signs_of_{width}", np.repeat(np.array([-1, 1], np.float32), half))
    for use in products:
        place = next(at for at, value in enumerate(use.inputs) if follows_from_sizes(value))
        angle = use.inputs[place]
        if angle is None:
            continue
        signed = add_node(use, "Mul", [angle, signs], f"{use.name}/signed")
        signed.shape, signed.dtype = angle.shape, ir.DataType.FLOAT
        use.replace_input_with(place, signed)
    replace_uses(node.outputs[0], result)
    return 1


def _ends(node: ir.Node, axis: int, width: int) -> tuple[int, int] | None:
    """Give where a Slice of the axis begins and ends."""
    numbers = [constant(value) for value in node.inputs[1:]]
    if any(item is None or item.size != 1 for item in numbers) or len(numbers) < 3:
        return None
    begin, end, place, *_ = (int(item.reshape(-1)[0]) for item in numbers if item is not None)
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 4
    return slice(begin, end).indices(width)[:2] if place % rank == axis else None


def shared_heads(graph: ir.Graph, node: ir.Node) -> int:
    """Let heads that several queries share be looked up as often as they are read.

    Before::

        x[batch, heads, sequence, size] ─ Unsqueeze(2) ─ Expand(times) ─ Reshape[0, heads * times, -1, size]

    After::

        x ─ Gather(axis 1, [0, 0, 1, 1, ...])
    """
    expand = made_by(node.inputs[0], "Expand")
    spread = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    before, after = (dims(spread.inputs[0]) if spread is not None else None), dims(node.outputs[0])
    if spread is None or spread.inputs[0] is None or before is None or after is None or len(before) != 4:
        return 0
    axes = constant(spread.inputs[1])
    heads, wanted = before[1], after[1] if len(after) == 4 else None
    if axes is None or axes.reshape(-1).tolist() != [2] or not isinstance(heads, int) or not isinstance(wanted, int):
        return 0
    if wanted % heads or before[3] != after[3]:
        return 0
    order = add_constant(graph, f"heads_{heads}_of_{wanted}", np.repeat(np.arange(heads), wanted // heads))
    result = add_node(node, "Gather", [spread.inputs[0], order], f"{node.name}/shared", {"axis": 1})
    result.shape, result.dtype = node.outputs[0].shape, ir.DataType.FLOAT
    replace_uses(node.outputs[0], result)
    return 1


def counted_positions(graph: ir.Graph, node: ir.Node) -> int:
    """Let positions that are counted from tokens be the rows of their table from the first one on.

    Before::

        input_ids ─ Equal(padding) ─ Not ─ CumSum ─ Mul ─ Add(padding) ─ Gather(table)

    After::

        Slice(table from the first row, 0 .. sequence)
    """
    table, index = constant(node.inputs[0]), node.inputs[1]
    if table is None or table.dtype != np.float32 or index is None or index.producer() is None:
        return 0
    ids = _padding_compared(index)
    if ids is None:
        return 0
    tokens, padding = ids
    found = computed(index, {str(tokens.name): np.full((1, _PROBED), padding + 1, np.int64)}).reshape(-1)
    if found.shape != (_PROBED,) or not np.array_equal(found, np.arange(_PROBED) + found[0]):
        return 0
    name = str(node.inputs[0].name)  # type: ignore[union-attr]
    rows = add_constant(graph, f"{name}/rows", np.ascontiguousarray(table[None, int(found[0]) :]))
    start, axis = (
        add_constant(graph, f"{name}/{end}", np.array([at], np.int64)) for end, at in (("start", 0), ("axis", 1))
    )
    length = add_node(node, "Shape", [tokens], f"{name}/length", {"start": 1, "end": 2})
    sliced = add_node(node, "Slice", [rows, start, length, axis], f"{node.name}/rows")
    sliced.shape, sliced.dtype = ir.Shape([1, "sequence", table.shape[1]]), ir.DataType.FLOAT
    replace_uses(node.outputs[0], sliced)
    return 1


def _padding_compared(index: ir.Value) -> tuple[ir.Value, int] | None:
    """Find the tokens that positions are counted from, and the padding token that they are compared with."""
    waiting, seen = [index], set[ir.Value]()
    counts, found = False, None
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        counts |= node.op_type == "CumSum"
        padding = constant(node.inputs[1]) if node.op_type == "Equal" else None
        if padding is not None and node.inputs[0] is not None and node.inputs[0].is_graph_input():
            found = node.inputs[0], int(padding.reshape(-1)[0])
        waiting += [item for item in node.inputs if item is not None and constant(item) is None]
    return found if counts else None


def biased(graph: ir.Graph, node: ir.Node) -> int:
    """Give a product with weights a bias of zeros where it has none: constants of other places move into it."""
    weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
    output = node.outputs[0]
    if weight is None or weight.ndim != 2 or roles.has(node, Role.OUTLIER_BRANCH) or output.is_graph_output():
        return 0
    following = readers(output)
    if is_read_once(output) and following[0].op_type == "Add" and bias_of(following[0]) is not None:
        return 0
    name = str(output.name)
    zeros = add_constant(graph, f"{node.name}/zeros", np.zeros(weight.shape[1], np.float32))
    first = next(each for each in graph if each in set(following))
    total = add_node(first, "Add", [output, zeros], f"{node.name}/biased")
    total.shape, total.dtype = output.shape, ir.DataType.FLOAT
    for use in tuple(output.uses()):
        if use.node is not total.producer():
            use.node.replace_input_with(use.idx, total)
    output.name, total.name = f"{name}/product", name
    return 1
