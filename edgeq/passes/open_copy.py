"""Copy what is made of the attention mask, as it is where every token counts: then it follows from sizes alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.data.tokens import Feeds
from edgeq.graph.dataflow import MASK
from edgeq.graph.edit import add_constant, constant, made_by
from edgeq.graph.evaluate import outputs_of
from edgeq.graph.operators import ELEMENTWISE, of_kind

SIZES = ((1, 3), (2, 9), (3, 6))  # of the batches on which a value is one number throughout
INFINITE, FINITE = 1e30, 1e4  # exp(-1e4) is 0 in FP32
_BY_ELEMENT = ELEMENTWISE | of_kind("comparison", "cast") | {"Identity"}


def open_copy(model: ir.Model, value: ir.Value, mask: ir.Value) -> ir.Value | None:
    """Write the operators that make a value of the attention mask (int64) once more, of ones in place of the mask.

    Before::

        attention_mask ─ any arithmetic ─ value

    After::

        Expand(1, Shape(attention_mask)) ─ the same arithmetic ─ copy

    An operator whose result is one number throughout becomes a constant where only operators by element read it, and a
    Where whose condition is one takes its branch: the infinite fill of padding goes with it. Infinite constants that
    are left become ±1e4.

    Args:
        model: gets the copies, in front of its other operators.
        value: depends on the mask, and on other inputs by their sizes alone.
        mask: the graph's input.

    Returns:
        The copy; None where it is 0 throughout.
    """
    made = _made_of(value, mask)
    copy = _Copy(model, mask, _numbers(model, [each for node in made for each in node.outputs]))
    for node in made:
        copy.add(node)
    found = copy.read(value, needs_shape=False)
    return None if _is_zero(found) else found


def shuts_by_constants(value: ir.Value) -> bool:
    """Tell whether a value is made of a float constant far below 0."""
    return any(_lowest(each) <= -FINITE / 10 for each in _above(value))


def _above(value: ir.Value) -> dict[ir.Value, None]:
    """Collect a value and all that it is made of."""
    found: dict[ir.Value, None] = {}
    waiting: list[ir.Value | None] = [value]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in found:
            found[each] = None
            node = each.producer()
            waiting += node.inputs if node is not None else []
    return found


def _lowest(value: ir.Value) -> float:
    """Give the lowest number of a float constant, or of what ConstantOfShape fills with; 0 for all else."""
    filled = made_by(value, "ConstantOfShape")
    number = filled.attributes["value"].as_tensor().numpy() if filled is not None and filled.attributes else None
    array = constant(value) if number is None else number
    return float(array.min()) if array is not None and array.dtype.kind == "f" and array.size else 0.0


def _made_of(value: ir.Value, mask: ir.Value) -> list[ir.Node]:
    """List the operators between a value and the mask, or an infinite constant, in order."""
    above = _above(value)
    below = {each for each in above if each is mask or abs(_lowest(each)) >= INFINITE}
    found = []
    for node in value.graph or ():
        is_filled = made_by(node.outputs[0], "ConstantOfShape") is not None and node.outputs[0] in below
        if node.outputs[0] not in above or node.op_type in ("Shape", "Size", "Constant"):
            continue
        if is_filled or any(item in below for item in node.inputs):
            below.update(node.outputs)
            found.append(node)
    return found


def _numbers(model: ir.Model, values: list[ir.Value]) -> dict[ir.Value, NDArray[np.generic]]:
    """Find the values that are one and the same number wherever every token counts, whatever the sizes."""
    session = outputs_of(model, values)
    runs = [session.run(None, Feeds(np.zeros(size, np.int64), np.ones(size, np.int64))) for size in SIZES]
    found = {}
    for value, *arrays in zip(values, *runs, strict=True):
        first = np.asarray(arrays[0]).reshape(-1)[:1]
        if all(array.size and np.all(array == first[0]) for array in arrays):
            found[value] = first.reshape(())
    return found


class _Copy:
    """Write copies of operators, at the head of a graph."""

    def __init__(self, model: ir.Model, mask: ir.Value, numbers: dict[ir.Value, NDArray[np.generic]]) -> None:
        self._graph, self._mask, self._numbers = model.graph, mask, numbers
        self._first = next(iter(model.graph))
        self._whole: dict[ir.Value, ir.Value] = {}  # original -> copy with its shape
        self._nodes: set[ir.Value] = set()

    def add(self, node: ir.Node) -> None:
        """Note that a node is copied when a copy reads it."""
        self._nodes.update(node.outputs)

    def read(self, value: ir.Value, needs_shape: bool) -> ir.Value:
        """Give the copy of a value, or the value where it does not depend on the mask."""
        if value is self._mask:
            return self._ones()
        if value not in self._nodes:
            return self._finite(value)
        node = value.producer()
        if node is None:
            raise ValueError(f"{value.name}: is made by no operator")
        if not needs_shape and value in self._numbers:
            return add_constant(self._graph, f"{value.name}/open", _bounded(self._numbers[value]))
        if not needs_shape:
            kept = self._kept(node)
            if kept is not None:
                return kept
        if value not in self._whole:
            self._write(node, needs_shape or node.op_type not in _BY_ELEMENT)
        return self._whole[value]

    def _kept(self, node: ir.Node) -> ir.Value | None:
        """Give the one operand that a node passes on, where its others are numbers that decide nothing."""
        if node.op_type == "Where" and node.inputs[0] in self._numbers:
            taken = node.inputs[1 if bool(self._numbers[node.inputs[0]]) else 2]
            return self.read(taken, needs_shape=False) if taken is not None else None
        if node.op_type == "Add":
            for place, other in ((0, 1), (1, 0)):
                value, kept = node.inputs[place], node.inputs[other]
                if value in self._numbers and not self._numbers[value] and kept is not None:
                    return self.read(kept, needs_shape=False)
        return None

    def _write(self, node: ir.Node, needs_shape: bool) -> None:
        inputs = [None if item is None else self.read(item, needs_shape) for item in node.inputs]
        attributes = dict(node.attributes)
        if node.op_type == "ConstantOfShape" and attributes:
            attributes["value"] = ir.AttrTensor("value", ir.tensor(_bounded(attributes["value"].as_tensor().numpy())))
        copied = ir.node(node.op_type, inputs, attributes=attributes, name=f"{node.name}/open")
        copied.outputs[0].name = f"{node.outputs[0].name}/open"
        copied.outputs[0].type, copied.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        self._graph.insert_before(self._first, copied)
        self._whole[node.outputs[0]] = copied.outputs[0]

    def _ones(self) -> ir.Value:
        if self._mask not in self._whole:
            size = ir.node("Shape", [self._mask], name=f"{MASK}/size")
            one = add_constant(self._graph, "one_token", np.array(1, np.int64))
            ones = ir.node("Expand", [one, size.outputs[0]], name=f"{MASK}/open")
            for node in (size, ones):
                node.outputs[0].name = node.name
                self._graph.insert_before(self._first, node)
            ones.outputs[0].type, ones.outputs[0].shape = self._mask.type, self._mask.shape
            self._whole[self._mask] = ones.outputs[0]
        return self._whole[self._mask]

    def _finite(self, value: ir.Value) -> ir.Value:
        array = constant(value)
        if array is None or array.dtype.kind != "f" or not np.any(np.abs(array) >= INFINITE):
            return value
        return add_constant(self._graph, f"{value.name}/finite", _bounded(array))


def _bounded(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.clip(array, -FINITE, FINITE).astype(array.dtype) if array.dtype.kind == "f" else array


def _is_zero(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and not np.any(array)
