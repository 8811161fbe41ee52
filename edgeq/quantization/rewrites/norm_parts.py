"""Write what decomposed normalisations share: one over the length of each row, and the names of the tensors inside.

LayerNormalization, RMSNorm and the division of a vector by its length all multiply a row by 1 / sqrt(sum of squares).
Each tensor inside gets a name of its own, because calibration observes it by that name.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import add_constant, add_node, replace_uses
from edgeq.graph.roles import Role

MEAN, CENTRED, SQUARES, INVERSE = "/mean", "/centred", "/squares", "/inverse"
NORMALIZED, GAINED = "/normalized", "/gained"


def inverse_length(node: ir.Node, x: ir.Value, floor: float) -> ir.Value:
    """Write ReduceSumSquare, Add, Sqrt and Reciprocal: float32[..., 1], one over the length of each row.

    The sum of squares, not their mean, goes under the root: an integer product makes it in one step, and sqrt(n) moves
    into the gain.

    Args:
        node: the normalisation, whose output names the tensors and gives them their shapes.
        x: float32[..., channels], the rows.
        floor: what is added to the sum of squares.
    """
    graph, whole = graph_of(node), node.outputs[0]
    name = str(whole.name)
    squares = add_node(node, "ReduceSumSquare", [x, last_axis(graph)], f"{name}{SQUARES}", like=whole, width=1)
    if floor > 0.0:
        least = add_constant(graph, f"{name}/floor", np.array([floor], np.float32))
        squares = add_node(node, "Add", [squares, least], f"{name}/floored", like=whole, width=1)
    root = add_node(node, "Sqrt", [squares], f"{name}/root", like=whole, width=1)
    return add_node(node, "Reciprocal", [root], f"{name}{INVERSE}", like=whole, width=1)


def normalized_and_gained(node: ir.Node, x: ir.Value, inverse: ir.Value, gain: np.ndarray) -> ir.Value:
    """Multiply rows by one over their length, and by gain times sqrt(channels)."""
    whole = node.outputs[0]
    name = str(whole.name)
    rows = add_node(node, "Mul", [x, inverse], f"{name}{NORMALIZED}", like=whole, role=Role.NORM_NORMALIZED)
    factor = add_constant(graph_of(node), f"{name}/gain", (gain * np.sqrt(gain.shape[-1])).astype(np.float32))
    return add_node(node, "Mul", [rows, factor], f"{name}{GAINED}", like=whole, role=Role.NORM_GAIN)


def take_place(node: ir.Node, result: ir.Value) -> None:
    """Let a tensor stand for a node's output, under its name, and remove the node."""
    output, graph = node.outputs[0], graph_of(node)
    name = str(output.name)
    replace_uses(output, result)
    output.name, result.name = f"{name}/fused", name
    graph.remove(node, safe=True)


def drop_unread(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove what makes a value that nobody reads."""
    node = value.producer() if value is not None else None
    if node is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    above = list(node.inputs)
    graph.remove(node, safe=True)
    for each in above:
        drop_unread(graph, each)


def last_axis(graph: ir.Graph) -> ir.Value:
    """Give the constant [-1], which all reductions of a graph share."""
    known = graph.initializers.get("last_axis")
    return known if known is not None else add_constant(graph, "last_axis", np.array([-1], np.int64))


def graph_of(node: ir.Node) -> ir.Graph:
    """Give the graph that a node stands in."""
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"node {node.name} stands in no graph")
    return node.graph
