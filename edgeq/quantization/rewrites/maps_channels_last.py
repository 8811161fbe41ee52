"""Compute on maps [batch, rows, columns, channels], as integer runtimes do, where a model has channels before rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.calibration.statistics import Observed
from edgeq.data.batches import PIXELS
from edgeq.graph import operators
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, made_by, readers, replace_uses
from edgeq.graph.roles import Role

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_PLACE = (0, 3, 1, 2)  # of the axes of [batch, channels, rows, columns] among those of the other order
_WINDOWS = frozenset({"Conv", "MaxPool", "AveragePool"})
_EACH_ELEMENT = operators.ELEMENTWISE | {"Identity"}


def maps_channels_last(model: ir.Model, statistics: Observed) -> Rewrites:
    """Put the channels of every map last, and a Transpose before and behind each `Conv`, `MaxPool` and `AveragePool`.

    Before::

        maps[batch, c, h, w] ─ Conv ─ Relu ─ Conv ─ Add ─ ReduceMean(2, 3)

    After::

        maps[batch, h, w, c] ─ Transpose ─ Conv ─ Transpose ─ Relu ─ Transpose ─ Conv ─ Transpose ─ Add
                             ─ ReduceMean(1, 2)

    A runtime writes Transpose, Conv and Transpose as one operator on the order that it has. Operators that work on each
    element, along axes or on axes take the order as it is; before what else reads maps they are turned back.

    Args:
        model: float; edited in place.
        statistics: by tensor; those of a turned map are the map's.
    """
    if not any(value.name == PIXELS for value in model.graph.inputs):
        return Rewrites(0)
    turned = _Turned(model.graph, statistics)
    for node in list(model.graph):
        turned.take(node)
    if turned.count:
        RemoveUnusedNodesPass()(model)  # what the other order made is read no more
    return Rewrites(turned.count)


class _Turned:
    """Hold the maps of a graph whose channels stand last."""

    def __init__(self, graph: ir.Graph, statistics: Observed) -> None:
        """Begin with none."""
        self.graph = graph
        self.statistics = statistics
        self.last: dict[ir.Value, ir.Value] = {}  # the map with its channels last, by the one with channels first
        self.first: dict[ir.Value, ir.Value] = {}  # maps that were turned back for what needs channels first
        self.count = 0

    def take(self, node: ir.Node) -> None:
        """Let a node read maps with channels last, or turn them back before it."""
        if node.op_type in _WINDOWS and _rank(node.inputs[0]) == 4:
            self._window(node)
            self.count += 1
            return
        rule = _elementwise if node.op_type in _EACH_ELEMENT else _RULES.get(node.op_type)
        is_of_maps = any(value in self.last for value in node.inputs)
        if rule is not None and (is_of_maps or node.op_type in _BEGINNING) and rule(self, node):
            self.count += 1
            return
        for place, value in enumerate(node.inputs):
            if value is not None and value in self.last:
                node.replace_input_with(place, self.turned_back(node, value))

    def of(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Give a map with its channels last."""
        if value not in self.last:
            self.last[value] = self._transposed(before, value, TO_LAST, f"{value.name}/last")
        return self.last[value]

    def turned_back(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """Give a map with its channels first, for what reads no other."""
        if value not in self.first:
            self.first[value] = self._transposed(before, self.last[value], TO_FIRST, f"{value.name}/first")
        return self.first[value]

    def is_now_last(self, value: ir.Value) -> None:
        """Note that a value itself has its channels last now."""
        self.last[value] = value
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([value.shape[axis] for axis in TO_LAST])

    def _window(self, node: ir.Node) -> None:
        source, output = node.inputs[0], node.outputs[0]
        if source is None:
            return
        shape = output.shape
        there = self._transposed(node, self.of(source, node), TO_FIRST, f"{node.name}/there", Role.MAP_ORDER)
        node.replace_input_with(0, there)
        back = ir.node("Transpose", [output], attributes={"perm": list(TO_LAST)}, name=f"{node.name}/back")
        self.graph.insert_after(node, back)
        made = back.outputs[0]
        made.name, made.dtype = f"{output.name}/last", ir.DataType.FLOAT
        back.metadata_props["edgeq.role"] = Role.MAP_ORDER
        if shape is not None:
            made.shape = ir.Shape([shape[axis] for axis in TO_LAST])
        self._keep(made, output)
        self.last[output] = made

    def _transposed(
        self, before: ir.Node, value: ir.Value, order: Sequence[int], name: str, role: Role | None = None
    ) -> ir.Value:
        made = add_node(before, "Transpose", [value], name, {"perm": list(order)}, role=role)
        made.dtype = ir.DataType.FLOAT
        if value.shape is not None:
            made.shape = ir.Shape([value.shape[axis] for axis in order])
        self._keep(made, value)
        return made

    def _keep(self, made: ir.Value, value: ir.Value) -> None:
        if str(value.name) in self.statistics:
            self.statistics[str(made.name)] = self.statistics[str(value.name)]


def _rank(value: ir.Value | None) -> int | None:
    shape = dims(value)
    return len(shape) if shape is not None else None


# one operator each: give whether it reads maps with channels last now -------------------------------------------------


def _elementwise(turned: _Turned, node: ir.Node) -> bool:
    if _rank(node.outputs[0]) != 4:
        return False
    operands: list[ir.Value | None] = []
    for value in node.inputs:
        array = constant(value)
        if value is None or value in turned.last:
            operands.append(value if value is None else turned.last[value])
        elif array is None:
            operands.append(turned.of(value, node) if _rank(value) == 4 else None)
            if operands[-1] is None:
                return False
        elif array.size == 1:
            operands.append(value)
        else:
            whole = array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(TO_LAST)
            operands.append(add_constant(turned.graph, f"{value.name}/last", np.ascontiguousarray(whole)))
    for place, operand in enumerate(operands):
        node.replace_input_with(place, operand)
    turned.is_now_last(node.outputs[0])
    return True


def _reduction(turned: _Turned, node: ir.Node) -> bool:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    if axes is None or node.inputs[0] is None:
        return False
    given = sorted(int(axis) % 4 for axis in axes.reshape(-1))
    if not keeps and given != [2, 3]:
        return False
    node.replace_input_with(0, turned.last[node.inputs[0]])
    moved = sorted(_PLACE[axis] for axis in given)
    node.replace_input_with(1, _axes(turned.graph, moved))
    if keeps:
        turned.is_now_last(node.outputs[0])
    return True


def _global_pool(turned: _Turned, node: ir.Node) -> bool:
    """Write GlobalAveragePool as ReduceMean."""
    source = node.inputs[0]
    if source is None:
        return False
    mean = ir.node("ReduceMean", [turned.last[source], _axes(turned.graph, [1, 2])], name=node.name)
    turned.graph.insert_after(node, mean)
    output, made = node.outputs[0], mean.outputs[0]
    made.shape, made.dtype = output.shape, ir.DataType.FLOAT
    name = str(output.name)
    replace_uses(output, made)
    output.name, made.name = f"{name}/pooled", name
    turned.is_now_last(made)
    return True


def _axes(graph: ir.Graph, axes: Sequence[int]) -> ir.Value:
    name = f"map_axes_{'_'.join(map(str, axes))}"
    known = graph.initializers.get(name)
    return known if known is not None else add_constant(graph, name, np.array(axes, np.int64))


def _transpose(turned: _Turned, node: ir.Node) -> bool:
    order, source = [int(axis) for axis in node.attributes["perm"].as_ints()], node.inputs[0]
    if source not in turned.last:
        if source is None or order != list(TO_FIRST):
            return False
        turned.last[node.outputs[0]] = source
        return True
    if len(order) != 4:
        return False
    moved = [_PLACE[axis] for axis in order]
    if moved == sorted(moved):
        replace_uses(node.outputs[0], turned.last[source])
        return True
    node.replace_input_with(0, turned.last[source])
    node.attributes["perm"] = ir.AttrInt64s("perm", moved)
    return True


def _reshape(turned: _Turned, node: ir.Node) -> bool:
    """Flatten maps to tokens, write tokens as maps, and drop rows and columns of one."""
    source, given, wanted = node.inputs[0], dims(node.inputs[0]), dims(node.outputs[0])
    if source is None or wanted is None:
        return False
    if source in turned.last:
        before = dims(turned.last[source])
        if before is None:
            return False
        _, rows, columns, channels = before
        if (rows, columns) == (1, 1):
            node.replace_input_with(0, turned.last[source])
            return True
        following = readers(node.outputs[0])
        is_turned = all(use.op_type == "Transpose" and _order(use) == [0, 2, 1] for use in following)
        sizes = [size for size in (rows, columns, channels) if isinstance(size, int)]
        if len(wanted) != 3 or wanted[1] != channels or not is_turned or not following or len(sizes) != 3:
            return False
        _, shape = turned.last[source], [0, sizes[0] * sizes[1], sizes[2]]
        target = add_constant(turned.graph, f"{node.name}/tokens", np.array(shape, np.int64))
        tokens = add_node(node, "Reshape", [turned.last[source], target], f"{node.name}/of_maps")
        for use in following:
            tokens.shape, tokens.dtype = use.outputs[0].shape, ir.DataType.FLOAT
            name = str(use.outputs[0].name)
            if str(source.name) in turned.statistics:
                turned.statistics.setdefault(str(tokens.name), turned.statistics[str(source.name)])
            if name in turned.statistics:
                turned.statistics[str(tokens.name)] = turned.statistics[name]
            replace_uses(use.outputs[0], tokens)
        return True
    tokens_of = made_by(source, "Transpose")
    if len(wanted) != 4 or given is None or len(given) != 3 or tokens_of is None or _order(tokens_of) != [0, 2, 1]:
        return False
    sizes = [size for size in wanted[1:] if isinstance(size, int)]
    if len(sizes) != 3 or given[1] != sizes[0] or tokens_of.inputs[0] is None:
        return False
    target = add_constant(turned.graph, f"{node.name}/maps", np.array([0, *sizes[1:], sizes[0]], np.int64))
    maps = add_node(node, "Reshape", [tokens_of.inputs[0], target], f"{node.name}/of_tokens")
    maps.shape, maps.dtype = ir.Shape([wanted[0], *sizes[1:], sizes[0]]), ir.DataType.FLOAT
    turned.last[node.outputs[0]] = maps
    return True


def _order(node: ir.Node) -> list[int]:
    return [int(axis) for axis in node.attributes["perm"].as_ints()]


def _squeeze(turned: _Turned, node: ir.Node) -> bool:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or node.inputs[0] is None or sorted(int(axis) % 4 for axis in axes.reshape(-1)) != [2, 3]:
        return False
    node.replace_input_with(0, turned.last[node.inputs[0]])
    node.replace_input_with(1, _axes(turned.graph, [1, 2]))
    return True


def _concat(turned: _Turned, node: ir.Node) -> bool:
    operands = [value for value in node.inputs if value is not None]
    if not all(value in turned.last for value in operands):
        return False
    for place, value in enumerate(operands):
        node.replace_input_with(place, turned.last[value])
    node.attributes["axis"] = ir.AttrInt64("axis", _PLACE[node.attributes["axis"].as_int() % 4])
    turned.is_now_last(node.outputs[0])
    return True


def _pad(turned: _Turned, node: ir.Node) -> bool:
    pads = constant(node.inputs[1])
    if pads is None or len(pads) != 8 or node.inputs[0] is None or len(node.inputs) > 3:
        return False
    moved = np.concatenate([pads[:4][list(TO_LAST)], pads[4:][list(TO_LAST)]]).astype(np.int64)
    node.replace_input_with(0, turned.last[node.inputs[0]])
    node.replace_input_with(1, add_constant(turned.graph, f"{node.name}/last", moved))
    turned.is_now_last(node.outputs[0])
    return True


_BEGINNING = frozenset({"Transpose", "Reshape"})  # may make maps of what is none
_RULES: dict[str, Callable[[_Turned, ir.Node], bool]] = {
    "ReduceMean": _reduction, "GlobalAveragePool": _global_pool, "Transpose": _transpose, "Reshape": _reshape,
    "Squeeze": _squeeze, "Concat": _concat, "Pad": _pad,
}  # fmt: skip
