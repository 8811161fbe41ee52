"""Move some neurons of a feed-forward block (FFN, GLU) into a branch of their own: exact in FP32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import add_constant, add_node, constant, insert_after, readers, replace_constant, required
from edgeq.graph.linear import FeedForward, Linear
from edgeq.graph.roles import Role


@dataclass(frozen=True)
class Branch:
    """Name a branch.

    Attributes:
        suffix: ends the names of what belongs to it.
        role: of its nodes, where they have one.
        sum_role: of the Add that joins it with the block.
    """

    suffix: str
    role: Role | None = None
    sum_role: Role | None = None


def move_neurons(
    graph: ir.Graph, block: FeedForward, few: NDArray[np.int64], rest: NDArray[np.int64], branch: Branch
) -> ir.Value:
    """Copy a block for a few neurons, add what the copy gives, and leave the rest to the block.

    Before::

        x ─ MatMul(W1) ─ Add(b1) ─ Gelu ─ MatMul(W2) ─ Add(b2)

    After::

        x ─┬─ MatMul(W1 rest) ─ Add ─ Gelu ─ MatMul(W2 rest) ─ Add(b2) ─┐
           └─ MatMul(W1 few) ── Add ─ Gelu ─ MatMul(W2 few) ────────────┴─ Add

    Args:
        graph: edited in place.
        block: whose neurons move.
        few: which move, int64[few].
        rest: which stay, int64[rest].
        branch: names what is made.

    Returns:
        What the branch's second product reads, float32[batch, sequence, few].
    """
    end, second = block.end, required(constant(block.second.inputs[1]))
    reading = set(readers(end))
    after = next(node for node in graph if node in reading)
    copies: dict[ir.Value, ir.Value] = {}
    for node in _in_order(block):
        copies[node.outputs[0]] = _copy_for(graph, block, node, copies, few, after, branch)
    name, suffix, hidden = str(block.second.name), branch.suffix, copies[block.hidden]
    rows = add_constant(graph, f"{name}.weight{suffix}", second[few])
    product = add_node(after, "MatMul", [hidden, rows], f"{name}{suffix}", like=end, role=branch.role)
    total = add_node(after, "Add", [end, product], f"{name}.total{suffix}", like=end, role=branch.sum_role)
    insert_after(end, total)
    for node in _in_order(block):
        for position, array in _by_neuron(node, len(few) + len(rest)):
            replace_constant(graph, node, position, array[..., rest])
        value = node.outputs[0]
        value.shape = None if value.shape is None else ir.Shape([*list(value.shape)[:-1], len(rest)])
    replace_constant(graph, block.second, 1, second[rest])
    return hidden


def _in_order(block: FeedForward) -> list[ir.Node]:
    """Give first products and what stands behind them so that each is made before it is read."""
    waiting, ordered = list(block.inside), list(block.firsts)
    while waiting:
        made = {node.outputs[0] for node in ordered}
        ready = next(
            node for node in waiting if all(value in made or constant(value) is not None for value in node.inputs)
        )
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _by_neuron(node: ir.Node, width: int) -> list[tuple[int, NDArray[np.float32]]]:
    """List the constants of a node that have an entry for each neuron, with their places."""
    arrays = [(position, array) for position, value in enumerate(node.inputs) if (array := constant(value)) is not None]
    return [(position, array) for position, array in arrays if array.ndim and array.shape[-1] == width]


def _copy_for(
    graph: ir.Graph,
    block: FeedForward,
    node: ir.Node,
    copies: dict[ir.Value, ir.Value],
    few: NDArray[np.int64],
    before: ir.Node,
    branch: Branch,
) -> ir.Value:
    """Copy a node of a block for a few neurons."""
    first = node if node in block.firsts else _bias_of_first(block, node)
    stem = str(first.name if first is not None else node.name)
    narrowed = dict(_by_neuron(node, _width(block)))
    inputs: list[ir.Value] = []
    for position, value in enumerate(node.inputs):
        if value is None:
            raise ValueError(f"{node.name}: an operator inside a feed-forward block lacks an operand")
        if position in narrowed:
            name = f"{stem}.weight{branch.suffix}" if node in block.firsts else f"{stem}.bias{branch.suffix}"
            inputs.append(add_constant(graph, name, narrowed[position][..., few]))
        else:
            inputs.append(copies.get(value, value))
    attributes = {name: item.value for name, item in node.attributes.items() if item.value is not None}
    like = node.outputs[0] if node.outputs[0].shape is not None else None
    return add_node(
        before, node.op_type, inputs, _name_of_copy(block, node, branch), attributes, like=like, width=len(few),
        role=branch.role,
    )  # fmt: skip


def _bias_of_first(block: FeedForward, node: ir.Node) -> ir.Node | None:
    """Give the first product whose bias a node adds."""
    linear = Linear.making(node.outputs[0]) if node.op_type == "Add" else None
    return linear.product if linear is not None and linear.product in block.firsts else None


def _name_of_copy(block: FeedForward, node: ir.Node, branch: Branch) -> str:
    if node in block.firsts:
        return f"{node.name}{branch.suffix}"
    first = _bias_of_first(block, node)
    if first is not None:
        return f"{first.name}.sum{branch.suffix}"
    if sum(_bias_of_first(block, step) is None for step in block.inside) == 1:
        return f"{block.firsts[0].name}.activation{branch.suffix}"
    return f"{block.firsts[0].name}.{node.op_type.lower()}_{block.inside.index(node)}{branch.suffix}"


def _width(block: FeedForward) -> int:
    weight = constant(block.second.inputs[1])
    if weight is None:
        raise ValueError(f"{block.second.name}: has no constant weight")
    return int(weight.shape[0])
