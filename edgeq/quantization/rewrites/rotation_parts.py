"""Find rotations by position (RoPE) in a graph, in whatever operators, and decide by computing them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeq.errors import EdgeqError
from edgeq.graph import double_precision
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import constant, dims, is_constant
from edgeq.graph.operators import LINEAR_IN_FIRST

# What has no integer form among channels:
MOVED = frozenset({"Concat", "Einsum", "MatMul", "Neg", "Split", "Sub"})
_LENGTH = 5  # positions of the probe
WIDEST = 512  # lanes


@dataclass(frozen=True)
class Rotation:
    """Hold y = x * own + x[partner] * other, lane by lane, at each position."""

    x: ir.Value
    y: ir.Value
    nodes: tuple[ir.Node, ...]  # between them, in order
    partner: NDArray[np.int64]  # [lanes]
    place: int  # the axis of positions


def region_of(end: ir.Node) -> list[ir.Node] | None:
    """List the linear operators, in order, that make a node's output of one value and of what positions give."""
    found: set[ir.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node not in found and _operands(node):
            found.add(node)
            waiting += [made for value in _operands(node) if (made := value.producer()) is not None]
    ordered = [node for node in end.graph or () if node in found]
    return ordered if len(_sources(ordered)) == 1 else None


def _sources(nodes: list[ir.Node]) -> list[ir.Value]:
    """List what operators are linear in and do not make themselves."""
    inside = set(nodes)
    operands = dict.fromkeys(value for node in nodes for value in _operands(node))
    return [value for value in operands if value.producer() not in inside]


def _operands(node: ir.Node) -> list[ir.Value]:
    """List what a node is linear in, where that is all that it reads but constants and what follows from sizes."""
    values = [value for value in node.inputs if value is not None]
    if node.op_type in LINEAR_IN_FIRST | {"Split"}:
        return values[:1] if values and not _is_fixed(values[0]) and all(map(_is_fixed, values[1:])) else []
    free = [value for value in values if not _is_fixed(value)]
    if node.op_type in ("Concat", "Add", "Sub"):  # a bias is not linear, nor is anything put between the lanes
        return free if all(value in free or _is_zero(value) for value in values) else []
    if node.op_type in ("Mul", "MatMul", "Einsum"):
        return free if len(free) == 1 and not (node.op_type == "MatMul" and not _moves(values[1])) else []
    return []


def _is_zero(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and not np.any(array)


def _is_fixed(value: ir.Value) -> bool:
    return is_constant(value) or follows_from_sizes(value)


def _moves(value: ir.Value) -> bool:
    """Tell whether a matrix has one number a column, as one that exchanges channels has: weights have more."""
    matrix = constant(value)
    return matrix is not None and matrix.ndim == 2 and bool(np.all(np.count_nonzero(matrix, axis=0) <= 1))


def rotation_in(nodes: list[ir.Node]) -> Rotation | str:
    """Find the part of a region that is a rotation, the largest first, or say why there is none."""
    ends = _chain_back(nodes)
    starts = _chain_on(nodes)
    reason = ""
    for y in ends:
        for x in starts:
            lanes = lanes_of(x)
            part = _between(nodes, x, y) if lanes and lanes == lanes_of(y) else None
            if part is None or not any(each.op_type in MOVED for each in part):
                continue
            judged = _judged(part, x, y)
            if isinstance(judged, Rotation):
                return judged
            reason = reason or judged
    return reason


def lanes_of(value: ir.Value) -> tuple[int | None, ...]:
    """Give the sizes of the axes, None where one is symbolic; empty unless the last is known and few."""
    sizes = tuple(size if isinstance(size, int) else None for size in dims(value) or ())
    return sizes if len(sizes) > 2 and sizes[-1] is not None and sizes[-1] <= WIDEST else ()


def _chain_back(nodes: list[ir.Node]) -> list[ir.Value]:
    """List the values from the end of a region back to where it joins parts: any may be the rotated tensor."""
    value: ir.Value | None = nodes[-1].outputs[0]
    found: list[ir.Value] = []
    while value is not None:
        found.append(value)
        node = value.producer()
        operands = _operands(node) if node is not None and node in nodes else []
        value = operands[0] if len(operands) == 1 else None
    return found


def _chain_on(nodes: list[ir.Node]) -> list[ir.Value]:
    """List the values from where a region first parts back to its source."""
    value, inside = _sources(nodes)[0], set(nodes)
    found = [value]
    while len(uses := [use.node for use in value.uses() if use.node in inside]) == 1 and len(uses[0].outputs) == 1:
        value = uses[0].outputs[0]
        found.insert(0, value)
    return found


def _between(nodes: list[ir.Node], x: ir.Value, y: ir.Value) -> list[ir.Node] | None:
    """List the operators of a region that make y of x, or give None where y is made of more."""
    above: set[ir.Node] = set()
    waiting: list[ir.Value] = [y]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value is x or node in above:
            continue
        if node is None or node not in nodes:
            return None
        above.add(node)
        waiting += _operands(node)
    return [node for node in nodes if node in above]


def _judged(nodes: list[ir.Node], x: ir.Value, y: ir.Value) -> Rotation | str:
    """Compute y for ones in each lane of x by itself."""
    shape = lanes_of(x)
    lanes = int(shape[-1] or 0)
    if shape[0] is not None or shape.count(None) != 2:
        return "exchanges channels of a tensor whose axes are not batch, positions and sizes that are known"
    place = shape.index(None, 1)
    sizes = [lanes, *(size or _LENGTH for size in shape[1:])]
    probe = np.zeros(sizes, np.float32)
    for lane in range(lanes):
        probe[lane, ..., lane] = 1.0
    try:
        found = _computed(nodes, x, y, probe)
    except EdgeqError as error:
        return f"exchanges channels in a way that cannot be computed alone: {error}"
    if found.shape != probe.shape:
        return f"exchanges channels, but gives {list(found.shape)} for {list(probe.shape)}"
    others = tuple(axis for axis in range(1, len(sizes) - 1) if axis != place)
    factors = np.moveaxis(found, place, 1)  # [lane of x, position, ..., lane of y]
    factors = factors.reshape(lanes, _LENGTH, -1, lanes)
    if others and not np.array_equal(factors, np.broadcast_to(factors[:, :, :1], factors.shape)):
        return "exchanges channels by factors that differ between heads"
    is_read = np.any(factors[:, :, 0] != 0, axis=1)  # [lane of x, lane of y]
    is_read[np.diag_indices(lanes)] = False
    if np.any(is_read.sum(axis=0) > 1):
        return "makes a channel of more than itself and one other, so it is no rotation of pairs"
    if not is_read.any():
        return ""
    partner = np.where(is_read.any(axis=0), is_read.argmax(axis=0), np.arange(lanes))
    return Rotation(x, y, tuple(nodes), partner.astype(np.int64), place)


def _computed(nodes: list[ir.Node], x: ir.Value, y: ir.Value, probe: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute y in FP64, with an array in place of x."""
    needed: set[ir.Node] = set()
    stored: dict[str, onnx.TensorProto] = {}
    waiting: list[ir.Value | None] = [y]
    while waiting:
        value = waiting.pop()
        if value is None or value is x:
            continue
        array, node = constant(value), value.producer()
        if array is not None:
            stored[str(value.name)] = numpy_helper.from_array(array, str(value.name))
        elif node is not None and node not in needed:
            needed.add(node)
            waiting += node.inputs
    ordered = [ir.to_proto(node) for node in nodes[0].graph or () if node in needed]
    end = helper.make_tensor_value_info(str(y.name), onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(ordered, "rotation", [], [end], list(stored.values()))
    ids = np.ones((len(probe), _LENGTH), np.int64)
    feeds: dict[str, double_precision.Array] = {"input_ids": ids, "attention_mask": ids, str(x.name): probe}
    return double_precision.outputs(helper.make_model(graph), feeds)[str(y.name)]
