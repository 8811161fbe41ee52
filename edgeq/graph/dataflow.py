"""Tell which values of a graph follow from the sizes of its inputs alone, and which from the attention mask.

Both are known before a text is: a runtime for one length stores the first as constants, and the second need no
calibration. A node that reads constants alone counts as a constant.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import constant, is_constant

MASK = "attention_mask"


def follows_from_sizes(value: ir.Value | None) -> bool:
    """Tell whether one value is among `shape_values`, by walking up from it: for graphs that are being edited."""
    seen: set[ir.Value] = set()
    waiting = [value]
    has_size = False
    while waiting:
        each = waiting.pop()
        if each is None or each in seen or is_constant(each):
            continue
        seen.add(each)
        node = each.producer()
        if node is None:
            return False
        if node.op_type == "Shape":
            has_size = True
            continue
        waiting += node.inputs
    return has_size


def shape_values(graph: ir.Graph, with_rows: bool = True) -> set[ir.Value]:
    """Collect the values that follow from nothing but the sizes of the inputs, as positions and rotations (RoPE) do.

    Args:
        graph: its nodes in order.
        with_rows: count the rows that a Slice by such sizes takes of a float32 table, too. A quantiser leaves them out:
            it stores the table in integers, and then they are rows of that. The rows that a Gather takes by positions,
            such as T5's bias by distance, count in both.

    In a QDQ model it stops where integers begin: at QuantizeLinear, and at tables of integers.
    """
    found: set[ir.Value] = set()
    fixed: set[ir.Value] = set()  # made of constants alone
    for node in graph:
        variable = _variable(node, fixed)
        if node.op_type == "Shape":
            found.update(node.outputs)
        elif not variable:
            fixed.update(node.outputs)
        elif all(value in found for value in variable) and not _begins_integers(node):
            if with_rows or not _is_row(node, found):
                found.update(node.outputs)
    return found


def mask_values(graph: ir.Graph, with_rows: bool = True) -> set[ir.Value]:
    """Collect the values that follow from the attention mask alone, or from it and the sizes of the inputs.

    Args:
        graph: its nodes in order; its input `attention_mask` counts.
        with_rows: count the rows of a float32 table that are looked up by such values, too; see `shape_values`.

    What follows from sizes alone is not among them. In a QDQ model it stops where integers begin.
    """
    sizes = shape_values(graph, with_rows)
    found = {value for value in graph.inputs if value.name == MASK}
    fixed: set[ir.Value] = set()
    for node in graph:
        variable = _variable(node, fixed)
        if not variable:
            fixed.update(node.outputs)
        elif node.outputs[0] in sizes or not all(value in found or value in sizes for value in variable):
            continue
        elif not _begins_integers(node) and (with_rows or not _is_row(node, sizes)):
            found.update(node.outputs)
    return found


def _variable(node: ir.Node, fixed: AbstractSet[ir.Value]) -> list[ir.Value]:
    """List the operands that are no constants."""
    return [value for value in node.inputs if value is not None and value not in fixed and not is_constant(value)]


def _begins_integers(node: ir.Node) -> bool:
    """Tell whether a node quantises, or looks up rows of integers that stand for real numbers."""
    table = constant(node.inputs[0]) if node.inputs else None
    return node.op_type == "QuantizeLinear" or (table is not None and table.dtype in (np.int8, np.int16))


def _is_row(node: ir.Node, sizes: AbstractSet[ir.Value]) -> bool:
    """Tell whether a node takes rows of a float32 table that a quantiser stores in integers."""
    if node.op_type not in ("Gather", "Slice") or (node.op_type == "Gather" and node.inputs[1] in sizes):
        return False
    table = constant(node.inputs[0])
    return table is not None and table.dtype == np.float32
