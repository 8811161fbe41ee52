"""Compute on [batch, tokens, channels] where a model computes on [batch, channels, tokens]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from edgeq.graph import operators
from edgeq.graph.edit import Rewrites, constant, is_read_once, readers
from edgeq.graph.evaluate import measured_shapes
from edgeq.passes.moved_transposes import TURNED, MovedTransposes, order_of
from edgeq.passes.transpose_moves import join, move, reduced
from edgeq.passes.turned_operand import Sizes


def tokens_before_channels(model: ir.Model) -> Rewrites:
    """Move every `Transpose` of tokens to channels first behind what reads it, until two of them meet and cancel.

    Before::

        x[batch, tokens, channels] ─ Transpose ─ Mul(mask[batch, 1, tokens]) ─ ReduceMean(1) ─ … ─ Transpose

    After::

        x ─ Mul(mask[batch, tokens, 1]) ─ ReduceMean(2) ─ …

    Operators that work on each element take the other order as it is; those along an axis take it along that axis;
    `Reshape` to heads and back parts the last axis instead. A Transpose stays in front of what needs channels first,
    such as a convolution that reads several tokens. Which axes are tokens and which channels is measured on two
    lengths.
    """
    candidates = [node for node in model.graph if node.op_type == "Transpose" and order_of(node) == TURNED]
    if not candidates or not any(value.name == "input_ids" for value in model.graph.inputs):
        return Rewrites(0)
    values = [value for node in model.graph for value in node.outputs]
    sizes: Sizes = dict(zip(values, measured_shapes(model, values), strict=True))
    state = MovedTransposes(model.graph, sizes, {node for node in candidates if _is_of_tokens(node, sizes)})
    if state.moving:
        for node in list(model.graph):
            _turn_convolution(state, node)
            _turn_scores(state, node)
        TopologicalSortPass()(model)
        for node in list(model.graph):
            state.count += move(state, node)
    if state.count:
        _finish(state)
    return Rewrites(state.count)


def _is_of_tokens(node: ir.Node, sizes: Sizes) -> bool:
    """Tell whether a Transpose reads [batch, tokens, channels]: the second axis varies, and the third does not."""
    read = sizes.get(node.inputs[0]) if node.inputs[0] is not None else None
    if read is None or read.shape[1] != len(TURNED):
        return False
    return bool(read[0, 1] != read[1, 1] and read[0, 2] == read[1, 2] > 1)


def _turn_convolution(state: MovedTransposes, node: ir.Node) -> None:
    """Put two Transposes that cancel behind a convolution over tokens, or behind the activation that alone reads it."""
    weight = constant(node.inputs[1]) if node.op_type == "Conv" else None
    if weight is None or weight.ndim != 3:
        return
    after = readers(node.outputs[0])
    end = after[0] if is_read_once(node.outputs[0]) and after[0].op_type in ("Relu", "Clip") else node
    value = end.outputs[0]
    given, uses = state.sizes[value], tuple(value.uses())
    there = state.transposed(end, value, TURNED)
    for use in uses:
        use.node.replace_input_with(use.idx, there)
    for place, output in enumerate(state.graph.outputs):
        if output is value:
            there.name, value.name = value.name, f"{value.name}/channels"
            state.graph.outputs[place] = there
    state.sizes[there] = given  # of what readers expect: `turn` makes the other of it
    maker = there.producer()
    if maker is not None:
        state.turn(maker, TURNED)


def _turn_scores(state: MovedTransposes, node: ir.Node) -> None:
    """Let scores with keys before queries, which a Softmax over the axis before the last tells, be those of queries."""
    if node.op_type != "Softmax":
        return
    rank = state.sizes[node.outputs[0]].shape[1]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    product, value = None, node.inputs[0]
    while axis % rank == rank - 2 and product is None and value is not None:
        step = value.producer()
        if step is None or step.op_type not in operators.ELEMENTWISE | {"MatMul"} or len(value.uses()) > 1:
            return
        product = step if step.op_type == "MatMul" else None
        value = next((item for item in step.inputs if item is not None and _is_scores(state, item, node)), None)
    operands = [item for item in product.inputs if item is not None] if product is not None else []
    if product is None or any(constant(item) is not None for item in operands):
        return
    swap = (*range(rank - 2), rank - 1, rank - 2)
    for place, operand in enumerate(reversed(operands)):
        product.replace_input_with(place, state.transposed(product, operand, swap, before=True))
    state.turn(product, swap)


def _is_scores(state: MovedTransposes, value: ir.Value, softmax: ir.Node) -> bool:
    """Tell whether a value is as large as what a Softmax gives: scores, not what masks them."""
    return value in state.sizes and np.array_equal(state.sizes[value], state.sizes[softmax.outputs[0]])


def _finish(state: MovedTransposes) -> None:
    """Sum masks up in the order that tokens have now, cancel what is left, and write shapes that inference loses."""
    for node in list(state.graph):
        twin = (
            state.operands.made(node.inputs[0], TURNED) if node.op_type in operators.REDUCING and node.inputs else None
        )
        keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        if twin is not None and not keeps:
            state.count += reduced(state, node, twin, TURNED)
    for node in state.moving:
        if node.graph is not None:
            join(state, node)
    for value in state.sizes:
        state.state_shape(value)
