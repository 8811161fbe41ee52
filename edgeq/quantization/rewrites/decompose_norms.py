"""Take LayerNormalization and the unit length apart into the operators that integer-only runtimes have.

The FP32 function stays the same. The tensors inside get names of their own, so that calibration observes them too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.attention_mask import is_mask
from edgeq.graph.edit import add_constant, add_node, constant, dims, made_by, readers, replace_uses
from edgeq.graph.rms_norm import root_mean_square
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.attention import biased, counted_positions, shared_heads, turned_halves
from edgeq.quantization.rewrites.token_pooling import cap_padding, last_token

ROW_MAXIMUM = "/row_maximum"  # ends the names of tensors that exist to be observed only
MEAN, CENTRED, SQUARES, INVERSE = "/mean", "/centred", "/squares", "/inverse"
NORMALIZED, GAINED = "/normalized", "/gained"
_FORMS: dict[str, Callable[[ir.Graph, ir.Node], int]] = {
    "Concat": turned_halves, "Gather": counted_positions, "MatMul": biased, "Reshape": shared_heads,
}  # fmt: skip


def primitives(model: ir.Model) -> int:
    """Take apart every LayerNormalization over the last axis and every division by ReduceL2; give how many.

    Poolings that pick tokens are written anew, and count too.

    Before::

        x ─ LayerNormalization(gain, bias)

    After::

        x ─┬─ ReduceMean ─ Sub ─┬─ ReduceSumSquare ─ Add(n eps) ─ Sqrt ─ Reciprocal ─ Mul ─ Mul(gain √n) ─ Add(bias)
           └────────────────┘   └──────────────────────────────────────────────────────┘

    The sum of squares, not their mean, goes under the root: an integer product makes it in one step, and sqrt(n) moves
    into the gain.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type == "LayerNormalization":
            count += _norm(graph, node)
        elif node.op_type == "Div":
            count += _unit_length(graph, node)
        elif node.op_type == "GatherElements":
            count += first_token(graph, node) or last_token(graph, node)
        elif node.op_type == "Where":
            count += cap_padding(graph, node)
        elif node.op_type == "Softmax":
            _row_maximum(graph, node)
        elif node.op_type == "Mul":
            count += _mean_square(graph, node)
        elif node.op_type in _FORMS:
            count += _FORMS[node.op_type](graph, node)
    return count


def follows(node: ir.Node) -> bool:
    """Tell whether the statistics of a node's output follow from another tensor's, or nothing asks for them."""
    if node.op_type == "Mul":
        return roles.has(node, Role.NORM_GAIN)
    if node.op_type == "Add":
        gained = made_by(node.inputs[0], "Mul")
        is_biased = len(node.inputs) > 1 and constant(node.inputs[1]) is not None
        return is_biased and roles.has(gained, Role.NORM_GAIN)
    following = readers(node.outputs[0])
    if node.op_type != "MatMul" or len(following) != 1 or following[0].op_type != "Add":
        return False
    is_scores = constant(node.inputs[1]) is None and any(map(is_mask, following[0].inputs))
    return is_scores or any(constant(value) is not None for value in following[0].inputs)


def _norm(graph: ir.Graph, node: ir.Node) -> int:
    x, shape = node.inputs[0], dims(node.outputs[0])
    gain = constant(node.inputs[1])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if x is None or gain is None or shape is None or axis not in (-1, len(shape) - 1) or len(node.outputs) > 1:
        return 0
    name, width = str(node.outputs[0].name), gain.shape[-1]
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    axes = _last_axis(graph)
    mean = _like(add_node(node, "ReduceMean", [x, axes], f"{name}{MEAN}"), node, 1)
    centred = _like(add_node(node, "Sub", [x, mean], f"{name}{CENTRED}"), node)
    inverse = _inverse_root(graph, node, centred, name, width * epsilon)
    normalized = _normalized(node, centred, inverse, name)
    factor = add_constant(graph, f"{name}/gain", (gain * np.sqrt(width)).astype(np.float32))
    result = _like(add_node(node, "Mul", [normalized, factor], f"{name}{GAINED}", role=Role.NORM_GAIN), node)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        result = _like(add_node(node, "Add", [result, bias], f"{name}/primitives", role=Role.NORM_BIAS), node)
    _take_place(graph, node, result, name)
    return 1


def _normalized(node: ir.Node, centred: ir.Value, inverse: ir.Value, name: str) -> ir.Value:
    value = add_node(node, "Mul", [centred, inverse], f"{name}{NORMALIZED}", role=Role.NORM_NORMALIZED)
    return _like(value, node)


def _mean_square(graph: ir.Graph, node: ir.Node) -> int:
    """Write a normalisation by the root of the mean square as a layer normalisation without centring."""
    found = root_mean_square(node)
    if found is None:
        return 0
    name, width = str(node.outputs[0].name), found.gain.size
    inverse = _inverse_root(graph, node, found.x, name, width * found.epsilon)
    normalized = _normalized(node, found.x, inverse, name)
    factor = add_constant(graph, f"{name}/gain", (found.gain * np.sqrt(width)).astype(np.float32))
    result = _like(add_node(node, "Mul", [normalized, factor], f"{name}{GAINED}", role=Role.NORM_GAIN), node)
    above = list(node.inputs)
    _take_place(graph, node, result, name)
    for value in above:
        _drop_unread(graph, value)
    return 1


def _drop_unread(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove what makes a value that nobody reads."""
    node = value.producer() if value is not None else None
    if node is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    above = list(node.inputs)
    graph.remove(node, safe=True)
    for each in above:
        _drop_unread(graph, each)


def _unit_length(graph: ir.Graph, node: ir.Node) -> int:
    """Take x / max(ReduceL2(x), smallest) apart."""
    x, length = node.inputs
    clipped = made_by(length, "Clip", "Max")
    norm = made_by(clipped.inputs[0], "ReduceL2") if clipped is not None else made_by(length, "ReduceL2")
    if x is None or norm is None or norm.inputs[0] is not x:
        return 0
    smallest = constant(clipped.inputs[1]) if clipped is not None and len(clipped.inputs) > 1 else None
    floor = float(smallest.reshape(-1)[0]) ** 2 if smallest is not None else 0.0
    name = str(node.outputs[0].name)
    inverse = _inverse_root(graph, node, x, name, floor)
    result = _like(add_node(node, "Mul", [x, inverse], f"{name}/primitives"), node)
    _take_place(graph, node, result, name)
    return 1


def first_token(graph: ir.Graph, node: ir.Node) -> int:
    """Take the first token as it lies: static artifacts are given texts that begin at position 0, never padded left."""
    found = node.inputs[1]
    while (step := made_by(found, "Expand", "Unsqueeze", "Cast", "Reshape")) is not None:
        found = step.inputs[0]
    if made_by(found, "ArgMax") is None or node.inputs[0] is None:
        return 0
    start, end, axis = (
        add_constant(graph, f"{node.name}/{name}", np.array([number], np.int64))
        for name, number in (("start", 0), ("end", 1), ("axis", 1))
    )
    first = add_node(node, "Slice", [node.inputs[0], start, end, axis], f"{node.name}/first")
    _like(first, node)
    replace_uses(node.outputs[0], first)
    return 1


def _inverse_root(graph: ir.Graph, node: ir.Node, x: ir.Value, name: str, floor: float) -> ir.Value:
    squares = _like(add_node(node, "ReduceSumSquare", [x, _last_axis(graph)], f"{name}{SQUARES}"), node, 1)
    if floor > 0.0:
        constant_floor = add_constant(graph, f"{name}/floor", np.array([floor], np.float32))
        squares = _like(add_node(node, "Add", [squares, constant_floor], f"{name}/floored"), node, 1)
    root = _like(add_node(node, "Sqrt", [squares], f"{name}/root"), node, 1)
    return _like(add_node(node, "Reciprocal", [root], f"{name}{INVERSE}"), node, 1)


def _row_maximum(graph: ir.Graph, node: ir.Node) -> None:
    """Let the largest score of each row be observed: it tells how far down a masked score must lie."""
    scores = node.inputs[0]
    if scores is not None:
        add_node(node, "ReduceMax", [scores, _last_axis(graph)], f"{scores.name}{ROW_MAXIMUM}")


def _last_axis(graph: ir.Graph) -> ir.Value:
    known = graph.initializers.get("last_axis")
    return known if known is not None else add_constant(graph, "last_axis", np.array([-1], np.int64))


def _like(value: ir.Value, node: ir.Node, width: int | None = None) -> ir.Value:
    """Give a new tensor the shape of the node's output, or one with another last axis."""
    shape = node.outputs[0].shape
    value.dtype = ir.DataType.FLOAT
    if shape is not None:
        value.shape = shape if width is None else ir.Shape([*list(shape)[:-1], width])
    return value


def _take_place(graph: ir.Graph, node: ir.Node, result: ir.Value, name: str) -> None:
    old = node.outputs[0]
    replace_uses(old, result)
    old.name = f"{name}/fused"
    result.name = name
    graph.remove(node, safe=True)
