"""Move the few feed-forward neurons with outlier activations into a small branch of their own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.graph.edit import (
    add_constant,
    add_node,
    constant,
    insert_after,
    readers,
    replace_constant,
    required,
)
from edgeq.graph.linear import FeedForward, Linear, feed_forwards
from edgeq.graph.roles import Role

SIDE = "/side"  # ends the names of what belongs to the outlier branch
BRANCH_WIDTH = 16  # neurons move in blocks of this many: integer kernels work on such blocks
BRANCH_RATIO = 0.02  # of the neurons of a block
OUTLIER_RATIO = (
    4.0  # a branch of its own pays where a neuron would otherwise take two of the eight bits from all others
)


def split_neurons(
    graph: ir.Graph, observed: Mapping[str, Statistics], swept: Mapping[str, Statistics]
) -> dict[str, Statistics]:
    """Move the neurons with the largest possible contribution of each feed-forward block into an outlier branch.

    Before::

        x ─ MatMul(W1) ─ Add(b1) ─ Gelu ─ MatMul(W2) ─ Add(b2)

    After::

        x ─┬─ MatMul(W1 rest) ─ Add ─ Gelu ─ MatMul(W2 rest) ─ Add(b2) ─┐
           └─ MatMul(W1 few) ── Add ─ Gelu ─ MatMul(W2 few) ────────────┴─ Add

    A neuron's contribution is bounded by its largest activation times the norm of its row of W2. Two per cent of
    the neurons move, rounded up to a block of 16, if the largest of them is four times what stays; else none does. The
    largest activation counts the vocabulary sweep too: some neurons are inactive on every calibration text, and far
    past every range at a rare name.

    Args:
        graph: edited in place.
        observed: statistics on the calibration texts.
        swept: statistics of the same tensors on a sweep through the vocabulary; used for nothing but this choice.

    Returns:
        The statistics with those of the moved neurons left out.
    """
    kept = dict(observed)
    for block in list(feed_forwards(graph)):
        name = str(block.hidden.name)
        statistics = observed.get(name)
        weight = constant(block.second.inputs[1])
        if statistics is None or weight is None or weight.shape[0] < 4 * BRANCH_WIDTH:
            continue
        largest = np.maximum(statistics.active_magnitudes, swept[name].active_magnitudes)
        bound = largest * np.linalg.norm(weight.astype(np.float64), axis=1)
        width = BRANCH_WIDTH * int(np.ceil(BRANCH_RATIO * weight.shape[0] / BRANCH_WIDTH))
        order = np.argsort(-bound, kind="stable")
        if bound[order[0]] < OUTLIER_RATIO * bound[order[width]]:
            continue
        few = np.sort(order[:width])
        rest = np.setdiff1d(np.arange(weight.shape[0]), few)
        _split(graph, block, few, rest)
        kept[name] = Statistics(statistics.minimum[rest], statistics.maximum[rest])
    return kept


def _split(graph: ir.Graph, block: FeedForward, few: NDArray[np.int64], rest: NDArray[np.int64]) -> None:
    """Copy a block for a few neurons, add what the copy gives, and leave the rest to the block."""
    end, second = block.end, required(constant(block.second.inputs[1]))
    reading = set(readers(end))
    after = next(node for node in graph if node in reading)
    copies: dict[ir.Value, ir.Value] = {}
    for node in _in_order(block):
        copies[node.outputs[0]] = _copy_for(graph, block, node, copies, few, after)
    rows = add_constant(graph, f"{block.second.name}.weight{SIDE}", second[few])
    name = str(block.second.name)
    product = add_node(after, "MatMul", [copies[block.hidden], rows], f"{name}{SIDE}", role=Role.OUTLIER_BRANCH)
    total = add_node(after, "Add", [end, product], f"{name}.total{SIDE}", role=Role.OUTLIER_SUM)
    insert_after(end, total)
    for node in _in_order(block):
        for position, array in _by_neuron(node, len(few) + len(rest)):
            replace_constant(graph, node, position, array[..., rest])
        value = node.outputs[0]
        value.shape = None if value.shape is None else ir.Shape([*list(value.shape)[:-1], len(rest)])
    replace_constant(graph, block.second, 1, second[rest])


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
            name = f"{stem}.weight{SIDE}" if node in block.firsts else f"{stem}.bias{SIDE}"
            inputs.append(add_constant(graph, name, narrowed[position][..., few]))
        else:
            inputs.append(copies.get(value, value))
    attributes = {name: item.value for name, item in node.attributes.items() if item.value is not None}
    return add_node(before, node.op_type, inputs, _name_of_copy(block, node), attributes, role=Role.OUTLIER_BRANCH)


def _bias_of_first(block: FeedForward, node: ir.Node) -> ir.Node | None:
    """Give the first product whose bias a node adds."""
    linear = Linear.making(node.outputs[0]) if node.op_type == "Add" else None
    return linear.product if linear is not None and linear.product in block.firsts else None


def _name_of_copy(block: FeedForward, node: ir.Node) -> str:
    if node in block.firsts:
        return f"{node.name}{SIDE}"
    first = _bias_of_first(block, node)
    if first is not None:
        return f"{first.name}.sum{SIDE}"
    if sum(_bias_of_first(block, step) is None for step in block.inside) == 1:
        return f"{block.firsts[0].name}.activation{SIDE}"
    return f"{block.firsts[0].name}.{node.op_type.lower()}_{block.inside.index(node)}{SIDE}"


def _width(block: FeedForward) -> int:
    weight = constant(block.second.inputs[1])
    if weight is None:
        raise ValueError(f"{block.second.name}: has no constant weight")
    return int(weight.shape[0])
