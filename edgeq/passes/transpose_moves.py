"""Move the Transposes before a node behind it: one function for each kind of operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgeq.graph import operators
from edgeq.graph.edit import add_constant, constant, replace_uses
from edgeq.passes.moved_transposes import TURNED, MovedTransposes, order_of
from edgeq.passes.turned_operand import Order

_ALONG_AN_AXIS = frozenset({"Softmax", "LogSoftmax", "LpNormalization"})
_EACH_ELEMENT = operators.ELEMENTWISE | operators.of_kind("comparison", "cast") | {"Identity"}


def move(state: MovedTransposes, node: ir.Node) -> bool:
    """Move the Transposes before a node behind it, where its operator allows; give whether it did."""
    if node.op_type == "Reshape":
        return _reshape(state, node)
    if not any(state.before(value) for value in node.inputs) and node not in state.joining:
        return False
    if node.op_type in _EACH_ELEMENT:
        return _elementwise(state, node)
    if node.op_type in operators.REDUCING:
        return _reduction(state, node)
    return node.op_type in _RULES and _RULES[node.op_type](state, node)


def _elementwise(state: MovedTransposes, node: ir.Node) -> bool:
    found = [state.before(value) for value in node.inputs]
    orders = {item[1] for item in found if item is not None}
    if len(orders) != 1 or state.sizes[node.outputs[0]].shape[1] != len(next(iter(orders))):
        return False
    (order,) = orders
    operands: list[ir.Value | None] = []
    for value, item in zip(node.inputs, found, strict=True):
        operand = item[0] if item is not None else state.operands.of(value, order) if value is not None else None
        if operand is None and value is not None:
            return False
        operands.append(operand)
    for place, operand in enumerate(operands):
        node.replace_input_with(place, operand)
    state.turn(node, order)
    return True


def _reduction(state: MovedTransposes, node: ir.Node) -> bool:
    found = state.before(node.inputs[0])
    return found is not None and reduced(state, node, *found)


def reduced(state: MovedTransposes, node: ir.Node, source: ir.Value, order: Order) -> bool:
    """Let a reduction read what a Transpose of this order reads, along the same axes."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or not axes.size:
        return False
    dropped = [int(axis) % len(order) for axis in axes.reshape(-1)]
    node.replace_input_with(0, source)
    node.replace_input_with(1, state.axes(node, np.array(sorted(order[axis] for axis in dropped))))
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    state.turn(node, order if keeps else _without(order, dropped))
    return True


def _without(order: Order, axes: Sequence[int]) -> list[int]:
    """Give the order of the axes that are left."""
    left = [source for axis, source in enumerate(order) if axis not in axes]
    return [sorted(left).index(source) for source in left]


def _pool(state: MovedTransposes, node: ir.Node) -> bool:
    """Write a GlobalAveragePool over tokens as a ReduceMean."""
    found = state.before(node.inputs[0])
    if found is None:
        return False
    source, order = found
    axes = state.axes(node, np.array(sorted(order[2:])))
    mean = ir.node("ReduceMean", [source, axes], attributes={"keepdims": 1}, name=node.name)
    state.graph.insert_after(node, mean)
    mean.outputs[0].name = f"{node.outputs[0].name}/mean"
    mean.outputs[0].dtype = ir.DataType.FLOAT
    state.sizes[mean.outputs[0]] = state.sizes[node.outputs[0]]
    replace_uses(node.outputs[0], mean.outputs[0])
    state.turn(mean, order)
    return True


def _along(state: MovedTransposes, node: ir.Node) -> bool:
    """Move before Softmax, and before Concat, Split and Gather by a stored index, along their axis."""
    is_joining = node.op_type == "Concat"
    found = [state.before(value) for value in (node.inputs if is_joining else node.inputs[:1])]
    orders = {item[1] if item is not None else None for item in found}
    order = next(iter(orders))
    if len(orders) != 1 or order is None:
        return False
    default = -1 if node.op_type in _ALONG_AN_AXIS else 0
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else default) % len(order)
    is_single = False
    if node.op_type == "Gather":
        index = constant(node.inputs[1])
        if index is None or index.ndim > 1:
            return False
        is_single = index.ndim == 0
    for place, item in enumerate(found):
        node.replace_input_with(place, item[0] if item is not None else None)
    node.attributes["axis"] = ir.AttrInt64("axis", order[axis])
    for position in range(len(node.outputs)):
        state.turn(node, _without(order, [axis]) if is_single else order, position)
    return True


def _slice(state: MovedTransposes, node: ir.Node) -> bool:
    found = state.before(node.inputs[0])
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if found is None or axes is None:
        return False
    source, order = found
    node.replace_input_with(0, source)
    node.replace_input_with(3, state.axes(node, np.array([order[int(axis) % len(order)] for axis in axes])))
    state.turn(node, order)
    return True


def _squeeze(state: MovedTransposes, node: ir.Node) -> bool:
    found = state.before(node.inputs[0])
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if found is None or axes is None:
        return False
    source, order = found
    dropped = [int(axis) % len(order) for axis in axes.reshape(-1)]
    node.replace_input_with(0, source)
    node.replace_input_with(1, state.axes(node, np.array(sorted(order[axis] for axis in dropped))))
    state.turn(node, _without(order, dropped))
    return True


def _shape_of(state: MovedTransposes, node: ir.Node) -> bool:
    """Ask for one size of what the Transpose reads."""
    found = state.before(node.inputs[0])
    start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
    if found is None or start is None or end is None or end - start != 1:
        return False
    source, order = found
    node.replace_input_with(0, source)
    node.attributes["start"] = ir.AttrInt64("start", order[start])
    node.attributes["end"] = ir.AttrInt64("end", order[start] + 1)
    return True


def join(state: MovedTransposes, node: ir.Node) -> bool:
    """Join a Transpose and the one before it; nothing is left of two that cancel."""
    maker, outer = node.inputs[0].producer() if node.inputs[0] is not None else None, order_of(node)
    inner = order_of(maker)
    source = maker.inputs[0] if maker is not None and inner is not None else None
    if source is None or inner is None or outer is None:
        return False
    order = [inner[axis] for axis in outer]
    if order == sorted(order) and not (node.outputs[0].is_graph_output() and _is_port(source)):
        replace_uses(node.outputs[0], source)
        return True
    node.replace_input_with(0, source)
    node.attributes["perm"] = ir.AttrInt64s("perm", order)
    return True


def _is_port(value: ir.Value) -> bool:
    return value.is_graph_output() or value.is_graph_input()


def _reshape(state: MovedTransposes, node: ir.Node) -> bool:
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    order = order_of(maker)
    if maker is None or order is None or maker.inputs[0] is None or node.inputs[0] not in state.sizes:
        return False
    source, is_moving = maker.inputs[0], maker in state.moving
    given, wanted = state.sizes[node.inputs[0]], state.sizes[node.outputs[0]]
    if is_moving and np.array_equal(given, wanted):
        replace_uses(node.outputs[0], node.inputs[0])
        return True
    parted, joined = wanted[:, 1:-1], given[:, 1:-1]
    keeps_ends = np.array_equal(given[:, [0, -1]], wanted[:, [0, -1]]) and given[0, -1] != given[1, -1]
    if is_moving and order == TURNED and keeps_ends and parted.shape[1] > 1 and (parted[0] == parted[1]).all():
        node.replace_input_with(0, source)
        node.replace_input_with(1, _target(state, node, parted[0].tolist()))
        state.turn(node, [0, *range(2, parted.shape[1] + 2), 1])
        return True
    if keeps_ends and wanted.shape[1] == 3 and joined.shape[1] > 1 and (joined[0] == joined[1]).all():
        _join_channels(state, node, source, [order[0], order[-1], *order[1:-1]])
        return True
    return False


def _join_channels(state: MovedTransposes, node: ir.Node, source: ir.Value, order: list[int]) -> None:
    """Join heads to channels behind the tokens."""
    read = source
    if order != sorted(order):
        read = state.transposed(node, source, order, before=True)
    width = int(state.sizes[node.outputs[0]][0, 1])
    node.replace_input_with(0, read)
    node.replace_input_with(1, _target(state, node, [width]))
    state.turn(node, TURNED)


def _target(state: MovedTransposes, node: ir.Node, tail: list[int]) -> ir.Value:
    node.attributes.pop("allowzero", None)
    return add_constant(state.graph, f"{node.name}/shape", np.array([0, 0, *tail], np.int64))


def _matmul(state: MovedTransposes, node: ir.Node) -> bool:
    """Write A @ B as (Bᵀ @ Aᵀ)ᵀ where that leaves A as it was before its Transpose, and B without one."""
    first, second = node.inputs
    found = state.before(first)
    if found is None or first is None or second is None or constant(second) is not None:
        return False
    source, order = found
    swapped, last = (*order[:-2], order[-1], order[-2]), len(order) - 1
    swap = (*range(last - 1), last, last - 1)
    maker = second.producer()
    is_turned = order_of(maker) == swap
    right = maker.inputs[0] if is_turned and maker is not None else state.operands.of(second, swap)
    if swapped[-1] != last or right is None:
        return False
    left = source
    if list(swapped) != sorted(swapped):
        left = state.transposed(node, source, swapped, before=True)
    node.replace_input_with(0, right)
    node.replace_input_with(1, left)
    state.turn(node, swap)
    return True


_RULES: dict[str, Callable[[MovedTransposes, ir.Node], bool]] = {
    "Transpose": join, "MatMul": _matmul, "Slice": _slice, "Squeeze": _squeeze, "Shape": _shape_of,
    "GlobalAveragePool": _pool, "Concat": _along, "Split": _along, "Gather": _along,
    **dict.fromkeys(_ALONG_AN_AXIS, _along),
}  # fmt: skip
