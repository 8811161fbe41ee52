"""Give operands of a graph with their axes in another order, without a Transpose where there is a way round it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph import operators
from edgeq.graph.edit import add_constant, constant

Sizes = dict[ir.Value, NDArray[np.int64]]  # dimensions for two batch sizes and lengths, int64[sizes, dimensions]
Order = tuple[int, ...]  # axis i of a Transpose's output is axis order[i] of its input

_COPIED = operators.of_kind("arithmetic", "function", "activation", "comparison", "cast")


class TurnedOperands:
    """Give what a Transpose of a given order would have to read to give a value, or a value that broadcasts like it.

    Masks, tables of positions, and constants are made in the other order from the start. What is as large as the
    tensors of tokens themselves is left to the caller.
    """

    def __init__(self, graph: ir.Graph, sizes: Sizes) -> None:
        """Take a graph and the measured sizes of all its values, to which those of new values are added."""
        self._graph = graph
        self._sizes = sizes
        self._count = 0
        self._made: dict[tuple[ir.Value, Order], ir.Value | None] = {}

    def of(self, value: ir.Value, order: Order) -> ir.Value | None:
        """Give the operand, or None where only a Transpose of tokens could."""
        if (value, order) not in self._made:
            self._made[value, order] = self._turned(value, order)
        return self._made[value, order]

    def made(self, value: ir.Value | None, order: Order) -> ir.Value | None:
        """Give the operand where it was asked for before, and is computed."""
        found = self._made.get((value, order)) if value is not None else None
        return found if found is not None and constant(found) is None else None

    def _turned(self, value: ir.Value, order: Order) -> ir.Value | None:
        array = constant(value)
        if array is not None:
            return self._constant(value, array, order)
        sizes, node = self._sizes.get(value), value.producer()
        if sizes is None and value.is_graph_input() and value.shape is not None:
            return self._behind(value, order) if len(value.shape) < len(order) else None
        if sizes is None or sizes.shape[1] > len(order):
            return None
        if (sizes == 1).all():
            return value
        if node is not None and sizes.shape[1] == len(order):
            found = self._remade(node, value, order)
            if found is not None:
                return found
        return self._behind(value, order) if self._is_small(sizes, order) else None

    def _constant(self, value: ir.Value, array: NDArray[np.generic], order: Order) -> ir.Value | None:
        if array.size == 1:
            return value
        if array.ndim > len(order):
            return None
        full = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
        turned = np.ascontiguousarray(np.transpose(full, np.argsort(order)))
        while turned.ndim > 1 and turned.shape[0] == 1:
            turned = turned[0]
        return add_constant(self._graph, str(value.name), turned)

    def _is_small(self, sizes: NDArray[np.int64], order: Order) -> bool:
        """Tell whether at most one of the axes that change places has more than one element."""
        padded = np.ones((len(sizes), len(order)), np.int64)
        padded[:, len(order) - sizes.shape[1] :] = sizes
        moved = [axis for axis, source in enumerate(order) if axis != source]
        return int((padded[:, moved] > 1).any(axis=0).sum()) <= 1

    def _remade(self, node: ir.Node, value: ir.Value, order: Order) -> ir.Value | None:
        """Write the node that makes a value again, so that it gives the other order."""
        inputs = list(node.inputs)
        if node.op_type in _COPIED:
            turned = [item if item is None else self.of(item, order) for item in inputs]
            lacks = any(new is None and old is not None for new, old in zip(turned, inputs, strict=True))
            return None if lacks else self._copied(node, turned, value, order)
        if node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == order:
            return inputs[0]
        if node.op_type == "Unsqueeze":
            return self._unsqueezed(node, value, order)
        if node.op_type == "Slice" and constant(node.inputs[0]) is not None and len(inputs) > 3:
            axes, table = constant(inputs[3]), constant(inputs[0])
            if axes is None or table is None or table.ndim != len(order) or inputs[0] is None:
                return None
            stored = add_constant(self._graph, str(inputs[0].name), np.transpose(table, np.argsort(order)).copy())
            moved = add_constant(self._graph, f"{node.name}/axes", _moved(axes, order))
            return self._copied(node, [stored, *inputs[1:3], moved, *inputs[4:]], value, order)
        if node.op_type in ("ReduceSum", "ReduceMean", "ReduceMax") and len(inputs) > 1 and inputs[0] is not None:
            axes, whole = constant(inputs[1]), self.of(inputs[0], order)
            keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
            if axes is None or whole is None or not keeps:
                return None
            moved = add_constant(self._graph, f"{node.name}/axes", _moved(axes, order))
            return self._copied(node, [whole, moved], value, order)
        return None

    def _unsqueezed(self, node: ir.Node, value: ir.Value, order: Order) -> ir.Value | None:
        axes = constant(node.inputs[1])
        if axes is None:
            return None
        new = {int(axis) % len(order) for axis in axes.reshape(-1)}
        places = [order[axis] for axis in range(len(order)) if axis not in new]
        if places != sorted(places):
            return None
        moved = add_constant(self._graph, f"{node.name}/axes", np.array(sorted(order[axis] for axis in new), np.int64))
        return self._copied(node, [node.inputs[0], moved], value, order)

    def _copied(self, node: ir.Node, inputs: Sequence[ir.Value | None], value: ir.Value, order: Order) -> ir.Value:
        attributes = {name: item.value for name, item in node.attributes.items() if item.value is not None}
        return self._placed(ir.node(node.op_type, inputs, attributes=attributes), node, value, order)

    def _behind(self, value: ir.Value, order: Order) -> ir.Value:
        """Write Unsqueeze, as far as axes lack, and Transpose behind a small value."""
        maker, read = value.producer(), value
        rank = len(value.shape) if value not in self._sizes else self._sizes[value].shape[1]  # type: ignore[arg-type]
        if rank < len(order):
            axes = add_constant(self._graph, f"{value.name}/axes", np.arange(len(order) - rank))
            node = ir.node("Unsqueeze", [value, axes])
            read = self._placed(node, maker, value, tuple(range(len(order))))
            maker = node
        node = ir.node("Transpose", [read], attributes={"perm": [int(axis) for axis in np.argsort(order)]})
        return self._placed(node, maker, value, order)

    def _placed(self, node: ir.Node, after: ir.Node | None, like: ir.Value, order: Order) -> ir.Value:
        if after is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(after, node)
        made = node.outputs[0]
        self._count += 1
        node.name = made.name = f"{like.name}/tokens_first_{self._count}"
        if like.dtype is not None:
            made.dtype = like.dtype
        sizes = self._sizes.get(like)
        if sizes is not None:
            full = np.ones((len(sizes), len(order)), np.int64)
            full[:, len(order) - sizes.shape[1] :] = sizes
            self._sizes[made] = full[:, np.argsort(order)]
        return made


def _moved(axes: NDArray[np.generic], order: Order) -> NDArray[np.int64]:
    return np.array([order[int(axis) % len(order)] for axis in axes.reshape(-1)], np.int64)
