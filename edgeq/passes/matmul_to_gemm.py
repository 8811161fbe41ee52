"""Run the encoder on a flat list of tokens, so that each weight product is one Gemm with its bias inside."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import TopologicalSortPass

from edgeq.graph import operators, roles
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
from edgeq.graph.linear import bias_of
from edgeq.graph.roles import Role

_INT32 = np.iinfo(np.int32)


def matmul_to_gemm(
    model: ir.Model, statistics: MutableMapping[str, Any] | None = None, takes_summands: bool = True
) -> Rewrites:
    """Replace MatMul and Add by Gemm on a flat list of tokens, batch and sequence together; give how many there are.

    Before::

        x[batch, sequence, in] ─ Q ─ DQ ─ MatMul(DQ(codes)) ─ Add(bias) ─ Reshape[0, 0, heads, size]

    After::

        x[tokens, in] ─ Q ─ DQ ─ Gemm(DQ(codes), DQ(int32 bias)) ─ Reshape[batch, sequence, heads, size]

    Runtimes add a bias inside a quantised Gemm, and in a pass of its own behind a quantised MatMul. The bias is
    rounded to the step of the integer sums, far below the rounding of the activations.

    Args:
        model: edited in place; it loses the shapes of its tensors.
        statistics: by tensor, where there are any: a tensor in another shape has those of the tensor that it was.
        takes_summands: let a float Gemm without bias add what is added behind it.
    """
    graph = model.graph
    flat = _flat_values(graph)
    if not flat:
        return Rewrites(0)
    shapes, same = _Shapes(graph), dict[str, str]()
    for value in flat:
        _enter(graph, value, flat, same)
    for value in flat:
        _leave(graph, value, flat, shapes, same)
    for value in flat:
        value.shape = None
    products = [node for node in graph if node.op_type == "MatMul" and node.outputs[0] in flat]
    for node in products:
        _write_gemm(graph, node, same)
    for node in list(graph):
        if node.op_type == "Gemm" and takes_summands:
            _take_summand(node)
    for new, old in same.items():
        if statistics is not None and old in statistics:
            statistics.setdefault(new, statistics[old])
    for value in (value for node in graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    TopologicalSortPass()(model)
    return Rewrites(len(products))


def _flat_values(graph: ir.Graph) -> list[ir.Value]:
    """List, in order, the outputs of nodes that treat each token alone.

    A token tensor has the axes batch, sequence, channels: looked-up rows, what elementwise ops and products make of
    them, and the context that attention gives back. Sizes cannot tell: inference loses the names of the axes.
    """
    tokens: set[ir.Value] = set()
    flat: dict[ir.Value, None] = {}
    for node in graph:
        output = node.outputs[0]
        if _makes_tokens(node, tokens):
            tokens.add(output)
            starts = node.op_type in operators.TOKEN_LIST_BEGINS or any(value in flat for value in node.inputs)
            if starts and _treats_tokens_alone(node, tokens):
                flat[output] = None
    return list(flat)


def _makes_tokens(node: ir.Node, tokens: set[ir.Value]) -> bool:
    shape = dims(node.outputs[0])
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
        return False
    if node.op_type == "Gather":
        indices = dims(node.inputs[1])
        return constant(node.inputs[0]) is not None and indices is not None and len(indices) == 2
    if node.op_type == "Reshape":
        target, source = constant(node.inputs[1]), made_by(node.inputs[0], "Transpose")
        is_merge = target is not None and target.tolist() == [0, 0, shape[2]]
        return is_merge and source is not None and list(source.attributes["perm"].as_ints()) == [0, 2, 1, 3]
    if node.op_type == "MatMul":
        weight = dims(node.inputs[1])
        return node.inputs[0] in tokens and weight is not None and len(weight) == 2
    return node.op_type in operators.TOKEN_LIST and any(value in tokens for value in node.inputs)


def _treats_tokens_alone(node: ir.Node, tokens: set[ir.Value]) -> bool:
    """Tell whether every operand is a token tensor or a constant along the channels."""
    if node.op_type in ("Gather", "Reshape"):
        return False
    if node.op_type == "MatMul":
        return True
    if node.op_type in ("LayerNormalization", "RMSNormalization") and "axis" in node.attributes:
        return node.attributes["axis"].as_int() in (-1, 2)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = constant(node.inputs[1])
        return scale is not None and scale.size == 1
    others = [constant(value) for value in node.inputs if value not in tokens]
    return all(array is not None and array.ndim <= 1 for array in others)


class _Shapes:
    """Make shape tensors that start with batch and sequence, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        ids = next(item for item in graph.inputs if item.name == "input_ids")
        self._graph = graph
        self._first = next(iter(graph))
        self._sizes = add_node(self._first, "Shape", [ids], "batch_and_sequence")
        self._made: dict[tuple[int, ...], ir.Value] = {}

    def of(self, tail: tuple[int, ...]) -> ir.Value:
        """Give the shape [batch, sequence, *tail]."""
        if tail not in self._made:
            name = "_".join(map(str, ("batch_and_sequence", *tail)))
            rest = add_constant(self._graph, f"{name}/tail", np.array(tail, np.int64))
            self._made[tail] = add_node(self._first, "Concat", [self._sizes, rest], name, {"axis": 0})
        return self._made[tail]


def _enter(graph: ir.Graph, value: ir.Value, flat: list[ir.Value], same: dict[str, str]) -> None:
    """Flatten what a flat node reads and no flat node made."""
    node = value.producer()
    if node is None:
        return
    for position, operand in enumerate(node.inputs):
        shape = dims(operand)
        if operand is None or operand in flat or shape is None or len(shape) != 3:
            continue
        width = shape[2]
        if not isinstance(width, int):
            continue
        name = f"flat_{width}"
        target = graph.initializers.get(name) or add_constant(graph, name, np.array([-1, width], np.int64))
        source = made_by(operand, "Reshape")
        if source is not None and is_read_once(operand):
            source.replace_input_with(1, target)
            operand.shape = None
            continue
        known = next(filter(_is_entry, readers(operand)), None)
        if known is None:
            entered = add_node(node, "Reshape", [operand, target], f"{operand.name}/flat", role=Role.FLAT_TOKENS)
            same[str(entered.name)] = str(operand.name)
        else:
            entered = known.outputs[0]
        node.replace_input_with(position, entered)


def _leave(graph: ir.Graph, value: ir.Value, flat: list[ir.Value], shapes: _Shapes, same: dict[str, str]) -> None:
    """Give a flat value its three axes back where anything else reads it."""
    shape = dims(value)
    if shape is None or not isinstance(shape[2], int):
        return
    outside = [use for use in value.uses() if not (use.node.outputs[0] in flat or _is_entry(use.node))]
    back = _as_output(graph, value, shapes, shape[2], same) if value.is_graph_output() else None
    for use in outside:
        split = constant(use.node.inputs[1]) if use.node.op_type == "Reshape" else None
        if split is not None and split.tolist()[:2] == [0, 0]:
            use.node.replace_input_with(1, shapes.of(tuple(split.tolist()[2:])))
            continue
        back = back or add_node(use.node, "Reshape", [value, shapes.of((shape[2],))], f"{value.name}/axes")
        same[str(back.name)] = str(value.name)
        use.node.replace_input_with(use.idx, back)


def _is_entry(node: ir.Node) -> bool:
    return roles.has(node, Role.FLAT_TOKENS)


def _as_output(graph: ir.Graph, value: ir.Value, shapes: _Shapes, width: int, same: dict[str, str]) -> ir.Value:
    """Let a Reshape carry the output's name, shape and place."""
    position = graph.outputs.index(value)
    node = ir.node("Reshape", [value, shapes.of((width,))], name=f"{value.name}/axes")
    graph.append(node)
    output = node.outputs[0]
    output.name, value.name = value.name, f"{value.name}/flat"
    same[str(value.name)] = str(output.name)
    output.shape = value.shape
    _copy_dtype(value, output)
    graph.outputs[position] = output
    return output


def _copy_dtype(old: ir.Value, new: ir.Value) -> None:
    if old.dtype is not None:
        new.dtype = old.dtype


def _write_gemm(graph: ir.Graph, node: ir.Node, same: dict[str, str]) -> None:
    """Replace MatMul and the Add behind it by a Gemm of the same name, the bias quantised where the product is."""
    reader = readers(node.outputs[0])
    add = reader[0] if len(reader) == 1 and reader[0].op_type == "Add" and is_read_once(node.outputs[0]) else None
    bias = bias_of(add) if add is not None else None
    inputs = list(node.inputs)
    if add is not None and bias is not None and bias[1].ndim == 1:
        summand = _bias(graph, node, str(add.inputs[bias[0]].name), bias[1])  # type: ignore[union-attr]
        inputs = inputs if summand is None else [*inputs, summand]
    gemm = ir.node("Gemm", inputs, name=str(node.name))
    output = gemm.outputs[0]
    replaced = add.outputs[0] if add is not None and len(inputs) == 3 else node.outputs[0]
    output.name = f"{replaced.name}/gemm"
    same[str(output.name)] = str(replaced.name)
    roles.hand_over(node, gemm)
    _copy_dtype(replaced, output)
    graph.insert_before(node, gemm)
    replace_uses(replaced, output)
    if len(inputs) == 3 and add is not None:
        graph.remove(add, safe=True)
    graph.remove(node, safe=True)


def _bias(graph: ir.Graph, node: ir.Node, name: str, bias: NDArray[np.float32]) -> ir.Value | None:
    """Give the bias as the Gemm takes it: int32 in steps of the sums for an integer product, float for a float one.

    None when it does not fit 32 bits.
    """
    activation, weight = (made_by(value, "DequantizeLinear") for value in node.inputs[:2])
    if activation is None or weight is None:
        return add_constant(graph, f"{name}/gemm", bias)
    scales = [constant(part.inputs[1]) for part in (activation, weight)]
    if scales[0] is None or scales[1] is None or scales[0].size != 1:
        return None
    step = scales[0].reshape(-1)[0] * np.broadcast_to(scales[1], bias.shape).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / step)
    if np.abs(codes).max() > _INT32.max:
        return None
    inputs = [
        add_constant(graph, f"{name}/codes", codes.astype(np.int32)),
        add_constant(graph, f"{name}/scale", step),
    ]
    # Named after the product: torch lets equal biases share one tensor.
    return add_node(node, "DequantizeLinear", inputs, f"{node.name}/bias", {"axis": 0})


def _take_summand(gemm: ir.Node) -> None:
    """Let a float Gemm without bias add what an Add behind it adds: it saves a pass over the tokens."""
    if len(gemm.inputs) == 3 or made_by(gemm.inputs[0], "DequantizeLinear") is not None:
        return
    reader = readers(gemm.outputs[0])
    if len(reader) != 1 or reader[0].op_type != "Add" or not is_read_once(gemm.outputs[0]):
        return
    add = reader[0]
    other = next(value for value in add.inputs if value is not gemm.outputs[0])
    graph = add.graph
    if other is None or graph is None or constant(other) is not None:
        return
    sum_node = ir.node("Gemm", [gemm.inputs[0], gemm.inputs[1], other], name=str(gemm.name))
    sum_node.outputs[0].name = f"{add.outputs[0].name}/gemm"
    roles.hand_over(gemm, sum_node)
    _copy_dtype(add.outputs[0], sum_node.outputs[0])
    graph.insert_before(add, sum_node)
    replace_uses(add.outputs[0], sum_node.outputs[0])
    graph.remove(add, safe=True)
    graph.remove(gemm, safe=True)
