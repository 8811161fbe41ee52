"""Slice the table of positions where a model counts positions from the tokens that are no padding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, replace_uses, required
from edgeq.graph.evaluate import computed

_PROBED = 7  # tokens on which positions are counted


def slice_counted_positions(model: ir.Model) -> Rewrites:
    """Replace the lookup of counted positions by the rows of their table from the first one on.

    Before::

        input_ids ─ Equal(padding) ─ Not ─ CumSum ─ Mul ─ Add(padding) ─ Gather(table)

    After::

        Slice(table from the first row, 0 .. sequence)

    Texts begin at position 0 in static artifacts, so that counting gives 0, 1, 2, … up to the padding, and no token is
    the padding token itself.
    """
    count, near = 0, []
    for node in list(model.graph):
        table = constant(node.inputs[0]) if node.op_type == "Gather" else None
        index = node.inputs[1] if table is not None else None
        if table is None or table.dtype != np.float32 or index is None or index.producer() is None:
            continue
        ids = _padding_compared(index)
        if ids is None:
            continue
        tokens, padding = ids
        rows = computed(index, {str(tokens.name): np.full((1, _PROBED), padding + 1, np.int64)}).reshape(-1)
        if rows.shape != (_PROBED,) or not np.array_equal(rows, np.arange(_PROBED) + rows[0]):
            near.append(f"{node.name}: positions are counted, but do not follow each other")
            continue
        _write_slice(model.graph, node, tokens, np.ascontiguousarray(table[None, int(rows[0]) :]))
        count += 1
    return Rewrites(count, tuple(near))


def _write_slice(graph: ir.Graph, node: ir.Node, tokens: ir.Value, table: np.ndarray) -> None:
    name = str(required(node.inputs[0]).name)
    rows = add_constant(graph, f"{name}/rows", table)
    start, axis = (
        add_constant(graph, f"{name}/{end}", np.array([at], np.int64)) for end, at in (("start", 0), ("axis", 1))
    )
    length = add_node(node, "Shape", [tokens], f"{name}/length", {"start": 1, "end": 2})
    sliced = add_node(node, "Slice", [rows, start, length, axis], f"{node.name}/rows")
    sliced.shape, sliced.dtype = ir.Shape([1, "sequence", table.shape[2]]), ir.DataType.FLOAT
    replace_uses(node.outputs[0], sliced)


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
