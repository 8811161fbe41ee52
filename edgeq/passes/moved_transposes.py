"""Hold a graph while Transposes of tokens are moved in it: which may move, and the measured sizes of its values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import add_constant, dims
from edgeq.graph.evaluate import MEASURED_SIZES
from edgeq.passes.turned_operand import Order, Sizes, TurnedOperands

TURNED: Order = (0, 2, 1)  # from [batch, tokens, channels] to [batch, channels, tokens], and back


def order_of(node: ir.Node | None) -> Order | None:
    """Give the order of a Transpose; None for other nodes, and without one."""
    is_one = node is not None and node.op_type == "Transpose" and "perm" in node.attributes
    return tuple(node.attributes["perm"].as_ints()) if node is not None and is_one else None


class MovedTransposes:
    """Hold a graph whose Transposes are moved.

    Attributes:
        graph: edited in place.
        sizes: the measured dimensions of its values, int64[sizes, dimensions] each; kept true.
        moving: the Transposes that may move behind what reads them.
        joining: those that stay, and join one before them.
        operands: gives the other operands in the other order.
        count: of the rewrites.
    """

    def __init__(self, graph: ir.Graph, sizes: Sizes, moving: set[ir.Node]) -> None:
        """Take a graph, the sizes of all its values, and the Transposes that may move."""
        self.graph = graph
        self.sizes = sizes
        self.moving = moving
        self.joining: set[ir.Node] = set()
        self.operands = TurnedOperands(graph, sizes)
        self.count = 0
        self._names = {str(value.name) for node in graph for value in node.outputs}

    def before(self, value: ir.Value | None) -> tuple[ir.Value, Order] | None:
        """Give what a moving Transpose reads, and its order, where one makes a value."""
        node = value.producer() if value is not None else None
        if node is None or node not in self.moving or node.inputs[0] is None:
            return None
        order = order_of(node)
        return (node.inputs[0], order) if order is not None else None

    def transposed(self, node: ir.Node, value: ir.Value, order: Sequence[int], before: bool = False) -> ir.Value:
        """Write a Transpose of a value behind a node, or before it; it stays where it is, and joins one before it."""
        made = ir.node("Transpose", [value], attributes={"perm": [int(axis) for axis in order]})
        (self.graph.insert_before if before else self.graph.insert_after)(node, made)
        result = made.outputs[0]
        made.name = result.name = self._free(f"{value.name}/turned")
        _take_dtype(result, value)
        self.sizes[result] = self.sizes[value][:, list(order)]
        self.state_shape(result)
        self.joining.add(made)
        return result

    def turn(self, node: ir.Node, order: Sequence[int], position: int = 0) -> None:
        """Put a moving Transpose behind an output, which has the order of tokens first now, for all that reads it."""
        value = node.outputs[position]
        given = self.sizes[value]
        inner = given.copy()
        inner[:, list(order)] = given
        self.sizes[value] = inner
        if list(order) == list(range(len(order))):
            self.state_shape(value)
            return
        uses, outputs = tuple(value.uses()), [place for place, item in enumerate(self.graph.outputs) if item is value]
        back = ir.node("Transpose", [value], attributes={"perm": [int(axis) for axis in order]})
        self.graph.insert_after(node, back)
        made = back.outputs[0]
        made.shape = value.shape
        _take_dtype(made, value)
        back.name = made.name = self._free(f"{value.name}/channels_first")
        for use in uses:
            use.node.replace_input_with(use.idx, made)
        for place in outputs:
            made.name, value.name = value.name, self._free(f"{value.name}/tokens_first")
            self.graph.outputs[place] = made
        self.sizes[made] = given
        self.moving.add(back)
        self.state_shape(value)

    def _free(self, name: str) -> str:
        free, number = name, 1
        while free in self._names:
            free, number = f"{name}_{number}", number + 1
        self._names.add(free)
        return free

    def state_shape(self, value: ir.Value) -> None:
        """Write the shape of a value from its measured sizes."""
        ids = dims(next(item for item in self.graph.inputs if item.name == "input_ids")) or [None, None]
        axes: list[int | str | None] = []
        for sizes in self.sizes[value].T:
            named = [ids[place] for place in (0, 1) if all(sizes == [each[place] for each in MEASURED_SIZES])]
            axes.append(int(sizes[0]) if sizes[0] == sizes[1] else named[0] if named else None)
        value.shape = ir.Shape(axes)

    def axes(self, node: ir.Node, array: np.ndarray) -> ir.Value:
        """Store axes for a node."""
        return add_constant(self.graph, f"{node.name}/axes", np.asarray(array, np.int64))


def _take_dtype(new: ir.Value, old: ir.Value) -> None:
    if old.dtype is not None:
        new.dtype = old.dtype
