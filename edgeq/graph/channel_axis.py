"""Tell which axis of each tensor holds the channels, from what a graph does with it.

Statistics for each channel, SmoothQuant, GPTQ and bias correction all mean that axis. It is what a product with a
weight contracts and gives, axis 1 of what a convolution reads and gives, the rows of a table of tokens, what a
normalisation works along, and where a constant with one number a channel stands. Transposes, operators on each element
and whatever else leaves the channels together carry it on, forwards and backwards.

Axes are counted from the end (-1 is the last), as broadcasting does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph import operators
from edgeq.graph.edit import constant, dims

Axes = Mapping[ir.Value, int]
Step = Callable[[int], int | None]  # from the axis of one value to that of another, None where it is lost
Link = tuple[ir.Value, ir.Value, Step, Step]

_HEADS = (-1, -2)  # of four axes: each head has channels of its own, and no statistics for each
_SAME_AXIS = (
    operators.ELEMENTWISE
    | operators.of_kind("comparison", "cast", "normalization", "joining", "extremum", "quantization")
    | {"Identity", "Split", "Slice", "Expand", "Tile", "GlobalAveragePool", "CumSum", "BatchNormalization"}
) - {"ReduceMax"}


def channel_axes(graph: ir.Graph) -> dict[ir.Value, int]:
    """Give the axis of the channels, counted from the end, of every value of which it can be told.

    What a node itself says of its operands counts more than what is carried on from others. A value of which two nodes
    say different things, as where tokens are mixed like channels, is left out, and so are the heads of attention.

    Args:
        graph: float or QDQ; its nodes in order.
    """
    links: dict[ir.Value, list[tuple[ir.Value, Step]]] = {}
    said: dict[ir.Value, set[int]] = {}
    hinted: dict[ir.Value, set[int]] = {}
    for node in graph:
        for first, second, onwards, back in _links(node):
            links.setdefault(first, []).append((second, onwards))
            links.setdefault(second, []).append((first, back))
        for value, axis in _said(node):
            said.setdefault(value, set()).add(axis)
        for value, axis in _hinted(node):
            hinted.setdefault(value, set()).add(axis)
    found = _carried(said, links, {})
    found = _carried({value: axes for value, axes in hinted.items() if value not in found}, links, found)
    known = {value: next(iter(axes)) for value, axes in found.items() if len(axes) == 1}
    return {value: axis for value, axis in known.items() if _has(value, axis)}


def by_name(model: onnx.ModelProto) -> dict[str, int]:
    """Give the axis of the channels by the name of the tensor, counted from the end, where it can be told."""
    return {str(value.name): axis for value, axis in channel_axes(ir.from_proto(model).graph).items()}


def rows(array: NDArray[np.float32], axis: int | None) -> NDArray[np.float32]:
    """Give a tensor as float32[rows, channels]; as one channel, float32[rows, 1], where its axis is not known."""
    if axis is None or array.ndim < -axis or (array.ndim == 4 and axis in _HEADS):
        return array.reshape(-1, 1)
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])


def _has(value: ir.Value, axis: int) -> bool:
    """Tell whether a value has the axis, of a fixed size; what has no stated shape is taken to have it.

    Heads of attention have none, and neither have scores, whose last two axes both grow with the text.
    """
    shape = dims(value)
    if shape is None:
        return True
    if len(shape) < -axis or not isinstance(shape[axis], int) or (len(shape) == 4 and axis in _HEADS):
        return False
    return len(shape) < 4 or any(isinstance(size, int) for size in shape[-2:])


def _carried(
    seeds: Mapping[ir.Value, set[int]],
    links: Mapping[ir.Value, list[tuple[ir.Value, Step]]],
    known: Mapping[ir.Value, set[int]],
) -> dict[ir.Value, set[int]]:
    """Carry axes on to all values that nothing is said of."""
    found = {**known, **{value: set(axes) for value, axes in seeds.items()}}
    fixed = set(found)
    waiting = [(value, axis) for value, axes in seeds.items() for axis in axes]
    while waiting:
        value, axis = waiting.pop()
        for other, step in links.get(value, ()):
            carried = step(axis)
            if carried is None or other in fixed or carried in found.setdefault(other, set()):
                continue
            found[other].add(carried)
            waiting.append((other, carried))
    return {value: axes for value, axes in found.items() if axes}


# what a node says of its operands and its result ----------------------------------------------------------------------


def _said(node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
    """Give what products, convolutions, tables and normalisations say."""
    first, output = node.inputs[0] if node.inputs else None, node.outputs[0]
    second = node.inputs[1] if len(node.inputs) > 1 else None
    axes: list[tuple[ir.Value | None, int]] = []
    if node.op_type in ("MatMul", "Gemm") and _is_weight(second):
        axes = [(first, -1), (output, -1)]
    elif node.op_type == "MatMul" and _is_weight(first):
        axes = [(second, -2), (output, -2)]
    elif node.op_type in ("Conv", "ConvTranspose") and (rank := _rank(second)) is not None:
        axes = [(first, 1 - rank), (output, 1 - rank)]
    elif node.op_type == "Gather" and _is_weight(first) and _rank(first) == 2 and _along(node, 2, 0) == -2:
        axes = [(output, -1)]
    elif node.op_type == "LayerNormalization" and _rank(second) == 1:
        axes = [(first, -1), (output, -1)]
    yield from ((value, axis) for value, axis in axes if value is not None and constant(value) is None)


def _hinted(node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
    """Give where a constant with one number a channel stands."""
    for value in node.inputs if node.op_type in operators.BROADCASTING else ():
        array = constant(value)
        long = [axis - array.ndim for axis, size in enumerate(array.shape) if size > 1] if array is not None else []
        if len(long) == 1:
            yield node.outputs[0], long[0]


def _is_weight(value: ir.Value | None) -> bool:
    """Tell whether a value is a float constant with two axes or more, or what DequantizeLinear makes of integers."""
    array = constant(value)
    maker = value.producer() if value is not None else None
    if array is None and maker is not None and maker.op_type == "DequantizeLinear":
        array = constant(maker.inputs[0])
    return array is not None and array.ndim >= 2


def _rank(value: ir.Value | None) -> int | None:
    array = constant(value)
    if array is not None:
        return int(array.ndim)
    shape = dims(value)
    maker = value.producer() if value is not None else None
    if shape is None and maker is not None and maker.op_type == "DequantizeLinear":
        return _rank(maker.inputs[0])
    return len(shape) if shape is not None else None


# how the axis is carried on ------------------------------------------------------------------------------------------


def _links(node: ir.Node) -> Iterator[Link]:
    operands = [value for value in node.inputs if value is not None and constant(value) is None]
    if not operands:
        return
    first, output = operands[0], node.outputs[0]
    if node.op_type in _SAME_AXIS:
        data = operands[:1] if node.op_type in ("Slice", "Split", "Expand", "Tile", "CumSum") else operands
        yield from ((value, made, _same, _same) for value in data for made in node.outputs)
    elif node.op_type == "Transpose" and "perm" in node.attributes:
        order = list(node.attributes["perm"].as_ints())
        yield first, output, _turned(np.argsort(order).tolist()), _turned(order)
    elif node.op_type == "MatMul" and len(operands) == 2:  # attention and pooling mix tokens, never channels
        yield operands[1], output, _only(-1), _only(-1)
        yield operands[0], output, _only(-2), _only(-2)
    elif node.op_type == "Reshape":
        yield from _reshaped(node, first, output)
    elif node.op_type in operators.REDUCING | {"ArgMax", "Squeeze"}:
        is_kept = node.op_type != "Squeeze" and _number(node, "keepdims", 1) == 1
        dropped = [] if is_kept else _axes(node, first)
        if dropped is not None:
            yield first, output, _left(dropped), _returned(dropped)
    elif node.op_type == "Unsqueeze":
        added = _axes(node, output)
        if added is not None:
            yield first, output, _returned(added), _left(added)
    elif node.op_type == "Gather" and first is node.inputs[0]:
        rank, index = _rank(first), _rank(node.inputs[1])
        at = _along(node, rank, 0)
        if at is not None and index == 0:
            yield first, output, _left([at]), _returned([at])
        elif at is not None and index == 1:
            yield first, output, _same, _same


def _same(axis: int) -> int:
    return axis


def _only(one: int) -> Step:
    return lambda axis: one if axis == one else None


def _turned(order: list[int]) -> Step:
    """Give the place of an axis in a value whose axis i is axis order⁻¹[i] of the other."""
    rank = len(order)
    return lambda axis: order[axis + rank] - rank if axis + rank >= 0 else None


def _left(dropped: list[int]) -> Step:
    """Give where an axis is once others, counted from the end, are dropped."""
    return lambda axis: None if axis in dropped else axis + sum(other > axis for other in dropped)


def _returned(dropped: list[int]) -> Step:
    """Give where an axis was before others, counted from the end, were dropped."""

    def step(axis: int) -> int:
        before = -1
        left = -axis
        while True:
            left -= before not in dropped
            if left == 0:
                return before
            before -= 1

    return step


def _reshaped(node: ir.Node, first: ir.Value, output: ir.Value) -> Iterator[Link]:
    """Carry the last axis on where a Reshape keeps it: it then moves axes in front of the channels alone."""
    before, after, target = dims(first), dims(output), constant(node.inputs[1])
    last = after[-1] if after else int(target.reshape(-1)[-1]) if target is not None and target.size else None
    if isinstance(last, int) and last > 1 and before and before[-1] == last:
        yield first, output, _only(-1), _only(-1)


def _axes(node: ir.Node, ranked: ir.Value) -> list[int] | None:
    """Give the axes that a node names, counted from the end; positive ones need a value with a known rank."""
    if node.op_type == "ArgMax":
        axes: list[int] = [_number(node, "axis", 0)]
    else:
        array = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if array is None:
            return None
        axes = [int(axis) for axis in array.reshape(-1)]
    rank = _rank(ranked)
    if rank is None and any(axis >= 0 for axis in axes):
        return None
    return [axis if axis < 0 else axis - (rank or 0) for axis in axes]


def _along(node: ir.Node, rank: int | None, default: int) -> int | None:
    axis = _number(node, "axis", default)
    return axis if axis < 0 else axis - rank if rank is not None else None


def _number(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
