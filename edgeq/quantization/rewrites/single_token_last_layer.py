"""Compute nothing but the pooled token in the last layer, where one token becomes the vector (CLS, last token).

Where one token is taken for the whole text, the other tokens' queries, feed-forward blocks and norms of the last layer
reach no output. So the choice of the token moves up from the end of the graph to where tokens meet for the last time.

Before::

    x ─┬───────────────────────────┬─ Add ─ norm ─ feed-forward ─ Add ─ norm ─ one token
       └─ queries, keys, values ─ attention

After::

    x ─┬─ one token ─┬──────────────────┬─ Add ─ norm ─ feed-forward ─ Add ─ norm
       │             └─ queries ─┐      │
       └─ keys, values ───────── attention

What then has one row costs next to nothing, so that a scheme may give it more bits: one token has no mean in which the
rounding of many tokens would vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgeq.calibration.statistics import Observed
from edgeq.data.batches import PIXELS
from edgeq.graph import operators, roles
from edgeq.graph.attention_mask import is_mask
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import (
    Rewrites,
    add_constant,
    add_node,
    constant,
    dims,
    is_read_once,
    made_by,
    readers,
    replace_uses,
)
from edgeq.graph.evaluate import computed
from edgeq.graph.roles import Role
from edgeq.passes.pool_by_matmul import POOLING

_ONE = "/one"  # ends the names of what is taken of a tensor
_PROBED = 5  # positions on which a causal mask is told from others

Demands = dict[int, tuple[ir.Value, int]]  # by the place of an input: the input, and the axis of its tokens


def single_token_last_layer(model: ir.Model, statistics: Observed) -> Rewrites:
    """Move the choice of one token up as far as tokens do not meet.

    Args:
        model: float, its poolings decomposed, its nodes in order; edited in place.
        statistics: by tensor; what is taken of a tensor gets the tensor's.

    Returns:
        How many nodes compute one token now; 0 where the vector is made of several.
    """
    graph = model.graph
    found = _choice(graph)
    if found is None:
        return Rewrites(0)
    ShapeInferencePass(strict_mode=False)(model)  # what other rewrites put there has no shape yet
    choice, hidden, token = found
    waiting = {hidden: _Waiting(1, [(use.node, use.idx) for use in choice.outputs[0].uses()])}
    replace_uses(choice.outputs[0], hidden)
    graph.remove(choice, safe=True)
    count = 0
    for node in reversed(list(graph)):
        value = node.outputs[0]
        asked = waiting.pop(value, None)
        if asked is None:
            continue
        demands = _demands(node, asked.axis)
        has_others = len(value.uses()) > len(asked.uses) or value.is_graph_output()
        if demands is None or has_others or not all(_can(token, item, axis) for item, axis in demands.values()):
            _take(value, asked, token, statistics)
            continue
        roles.give(node, Role.SINGLE_TOKEN)
        value.shape = _with_one(value, asked.axis)
        for position, (item, axis) in demands.items():
            waiting.setdefault(item, _Waiting(axis)).uses.append((node, position))
        count += 1
    return Rewrites(count)


@dataclass
class _Waiting:
    """Hold who reads one token of a value: the nodes, at which of their inputs, and the axis of the tokens."""

    axis: int
    uses: list[tuple[ir.Node, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _First:
    """Take what stands at position 0."""

    graph: ir.Graph

    def can(self, value: ir.Value, axis: int) -> bool:
        """Tell whether it is a tensor of tokens, or follows from positions or the mask."""
        shape = dims(value)
        if shape is None or value.producer() is None:
            return False
        return len(shape) == 3 or follows_from_sizes(value) or is_mask(value)

    def taken(self, value: ir.Value, axis: int, before: ir.Node) -> ir.Value:
        """Write what takes it; the axis stays, with size 1."""
        name = f"{value.name}{_ONE}"
        numbers = {"start": 0, "end": 1, "axis": axis}
        ends = [add_constant(self.graph, f"{name}/{end}", np.array([at], np.int64)) for end, at in numbers.items()]
        return add_node(before, "Slice", [value, *ends], name)


@dataclass(frozen=True)
class _Last:
    """Take the last token that is no padding, by its product with shares, float32[batch, 1, sequence]."""

    shares: ir.Value

    def can(self, value: ir.Value, axis: int) -> bool:
        """Tell whether it is a tensor of tokens, or a mask that hides nothing but padding from the last token."""
        shape = dims(value)
        if shape is None or value.producer() is None:
            return False
        if axis == 2 and len(shape) == 4:
            return _causal(value) is not None
        return axis == 1 and len(shape) == 3 and isinstance(shape[2], int) and not follows_from_sizes(value)

    def taken(self, value: ir.Value, axis: int, before: ir.Node) -> ir.Value:
        """Multiply by the shares; of a mask, leave out where each position may look."""
        name = f"{value.name}{_ONE}"
        mask = _causal(value) if axis == 2 else None
        if mask is None:
            return add_node(before, "MatMul", [self.shares, value], f"{POOLING}/{name}", role=Role.POOLING)
        lowered = add_node(before, "Sub", [mask.padding, mask.one], f"{name}/lowered")
        return add_node(before, "Mul", [lowered, mask.size], name)


_Token = _First | _Last


@dataclass(frozen=True)
class _Causal:
    """Hold the parts of a mask (padding * allowed - one) * size."""

    padding: ir.Value
    one: ir.Value
    size: ir.Value


def _causal(value: ir.Value) -> _Causal | None:
    """Part a mask that lets each position look at all before it, or give None."""
    whole = made_by(value, "Mul") if is_mask(value) else None
    lowered, size = _parted(whole, "Sub")
    inner = made_by(lowered, "Sub")
    both, one = _parted(inner, "Mul")
    limited = made_by(both, "Mul")
    allowed = next((item for item in limited.inputs if follows_from_sizes(item)), None) if limited is not None else None
    padding = next((item for item in limited.inputs if item is not allowed), None) if limited is not None else None
    if allowed is None or padding is None or one is None or size is None:
        return None
    ids = np.ones((1, _PROBED), np.int64)
    found = computed(allowed, {"input_ids": ids, "attention_mask": ids})
    is_causal = np.array_equal(found.reshape(found.shape[-2:]), np.tri(_PROBED))
    return _Causal(padding, one, size) if is_causal else None


def _parted(node: ir.Node | None, op_type: str) -> tuple[ir.Value | None, ir.Value | None]:
    """Give the operand that an operator makes, and the other one."""
    for place, value in enumerate(node.inputs[:2] if node is not None else ()):
        if node is not None and made_by(value, op_type) is not None:
            return value, node.inputs[1 - place]
    return None, None


def _choice(graph: ir.Graph) -> tuple[ir.Node, ir.Value, _Token] | None:
    """Find the node by which one token becomes the vector, and the hidden states, which nothing else reads."""
    for node in reversed(list(graph)):
        if node.op_type == "Gather":
            node = _sliced(graph, node)
        if node.op_type == "Slice" and _is_first(node):
            hidden: ir.Value | None = node.inputs[0]
            token: _Token = _First(graph)
        elif roles.has(node, Role.PICKED_TOKEN) and node.inputs[0] is not None:
            hidden, token = node.inputs[1], _Last(node.inputs[0])
        else:
            continue
        return (node, hidden, token) if hidden is not None and is_read_once(hidden) else None
    return None


def _is_first(node: ir.Node) -> bool:
    numbers = [constant(value) for value in node.inputs[1:4]]
    return _is_hidden(node.inputs[0]) and [item.tolist() for item in numbers if item is not None] == [[0], [1], [1]]


def _is_hidden(value: ir.Value | None) -> bool:
    shape = dims(value)
    is_computed = value is not None and value.producer() is not None and not follows_from_sizes(value)
    are_tokens = shape is not None and len(shape) == 3 and (not isinstance(shape[1], int) or _is_of_image(value))
    return is_computed and are_tokens


def _is_of_image(value: ir.Value | None) -> bool:
    """Tell whether a value stands in a graph of images, whose tokens have a fixed number."""
    graph = value.graph if value is not None else None
    return graph is not None and any(item.name == PIXELS for item in graph.inputs)


def _sliced(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """Write the lookup of position 0 as a slice, and give that; leave other lookups."""
    index, hidden = constant(node.inputs[1]), node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if index is None or index.ndim or index.item() or axis != 1 or hidden is None or not _is_hidden(hidden):
        return node
    first = _First(graph).taken(hidden, axis, node)
    first.shape, first.dtype = _with_one(hidden, axis), ir.DataType.FLOAT
    axes = add_constant(graph, f"{node.name}/axes", np.array([axis], np.int64))
    row = add_node(node, "Squeeze", [first, axes], f"{node.name}/row")
    row.shape, row.dtype, row.name = node.outputs[0].shape, ir.DataType.FLOAT, node.outputs[0].name
    replace_uses(node.outputs[0], row)
    graph.remove(node, safe=True)
    return first.producer() or node


def _can(token: _Token, value: ir.Value, axis: int) -> bool:
    """Tell whether the token can be taken of a value, or of all that makes it and is made for it alone."""
    if token.can(value, axis):
        return True
    node = value.producer()
    demands = _demands(node, axis) if node is not None and is_read_once(value) else None
    return demands is not None and all(_can(token, item, place) for item, place in demands.values())


def _take(value: ir.Value, asked: _Waiting, token: _Token, statistics: Observed) -> None:
    """Take the token of a value for those who asked; a mask's is made before the first layer reads the mask."""
    shape = dims(value)
    if shape is not None and shape[asked.axis] == 1:  # it is the only one
        for node, position in asked.uses:
            node.replace_input_with(position, value)
        return
    following = set(readers(value))
    before = next(node for node in value.graph or () if node in following)
    one = token.taken(value, asked.axis, before)
    one.shape, one.dtype = _with_one(value, asked.axis), ir.DataType.FLOAT
    for node, position in asked.uses:
        node.replace_input_with(position, one)
    if str(value.name) in statistics:
        statistics[str(one.name)] = statistics[str(value.name)]


def _with_one(value: ir.Value, axis: int) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([1 if at == axis else size for at, size in enumerate(value.shape)])


def _demands(node: ir.Node, axis: int) -> Demands | None:
    """Say of which inputs one token is needed, for one of the output's; None where tokens meet."""
    shape, source = dims(node.outputs[0]), node.inputs[0] if node.inputs else None
    if shape is None or source is None or len(node.outputs) > 1:
        return None
    if node.op_type in operators.ELEMENTWISE:
        return _of_elements(node, axis, len(shape))
    rule = _RULES.get(node.op_type)
    place = rule(node, axis, len(shape)) if rule is not None else None
    return {0: (source, place)} if place is not None else None


def _of_elements(node: ir.Node, axis: int, rank: int) -> Demands | None:
    demands: Demands = {}
    for position, value in enumerate(node.inputs):
        shape = dims(value)
        if value is None or shape is None:
            return None
        place = axis - (rank - len(shape))
        is_one = place >= 0 and shape[place] == 1  # of an image's pooled tokens the only one is followed up, too
        if place >= 0 and (not is_one or (value.producer() is not None and _is_of_image(value))):
            demands[position] = (value, place)
    return demands


def _of_product(node: ir.Node, axis: int, rank: int) -> int | None:
    left = dims(node.inputs[0])
    return axis if axis == rank - 2 and left is not None and len(left) == rank else None


def _of_channels(node: ir.Node, axis: int, rank: int) -> int | None:
    """Reducing the last axis, or a softmax over it, leaves the axes in front."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    given = axes.reshape(-1).tolist() if axes is not None else [node.attributes["axis"].as_int()]
    return axis if [place % rank for place in given] == [rank - 1] and axis < rank - 1 else None


def _of_order(node: ir.Node, axis: int, rank: int) -> int | None:
    return int(node.attributes["perm"].as_ints()[axis])


def _of_heads(node: ir.Node, axis: int, rank: int) -> int | None:
    """Parting channels into heads, or joining them, leaves the axes in front."""
    shape = constant(node.inputs[1])
    return axis if shape is not None and axis == 1 and shape.reshape(-1)[:2].tolist() == [0, 0] else None


def _of_lookup(node: ir.Node, axis: int, rank: int) -> int | None:
    """Looking up along another axis, as turned halves are and heads that queries share, leaves this one."""
    index, looked_up = constant(node.inputs[1]), node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis if index is not None and index.ndim == 1 and looked_up % rank != axis else None


_RULES: dict[str, Callable[[ir.Node, int, int], int | None]] = {
    "Gather": _of_lookup, "MatMul": _of_product, "ReduceMean": _of_channels, "ReduceSumSquare": _of_channels,
    "Reshape": _of_heads, "Softmax": _of_channels, "Transpose": _of_order,
}  # fmt: skip
