"""Turn convolutions that read one token at a time into weight products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, replace_uses

TURNED = [0, 2, 1]  # [batch, channels, tokens] to [batch, tokens, channels], and back


def pointwise_product(model: ir.Model) -> Rewrites:
    """Replace `Conv` with kernel 1 over tokens, and `MatMul` with its weight on the left, by x @ W between Transposes.

    Before::

        x[batch, in, tokens] ─ Conv(W[out, in, 1], b)
        MatMul(W[out, in], x[batch, in, tokens])

    After::

        x ─ Transpose[0, 2, 1] ─ MatMul(Wᵀ) ─ Add(b) ─ Transpose[0, 2, 1]

    The rest of the pipeline sees a product like any other, and `tokens_before_channels` takes the Transposes away. Of a
    grouped convolution the weight is written whole, with zeros where a group does not read: it is then one product in
    every runtime, where parts would have to be cut and joined again. With one channel in each group it is a `Mul`.
    """
    if not any(value.name == "input_ids" for value in model.graph.inputs):
        return Rewrites(0)  # maps of an image
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type == "MatMul":
            weight, shape = constant(node.inputs[0]), dims(node.inputs[1])
            is_weight = weight is not None and weight.ndim == 2 and weight.dtype == np.float32
            if weight is None or not is_weight or shape is None or len(shape) != 3 or isinstance(shape[2], int):
                continue
            replace_uses(node.outputs[0], _between_transposes(node, 1, weight.T, None, node.inputs[0]))
            count += 1
        elif node.op_type == "Conv":
            weight = constant(node.inputs[1])
            if weight is None or weight.ndim != 3:
                continue
            why = _why_not(node, weight)
            if why:
                near.append(f"{node.name}: a convolution over tokens {why}")
                continue
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            made = _between_transposes(node, 0, _whole(node, weight), bias, node.inputs[1])
            replace_uses(node.outputs[0], made)
            count += 1
    return Rewrites(count, tuple(near))


def _why_not(node: ir.Node, weight: NDArray[np.float32]) -> str:
    """Say what makes an output token of a Conv depend on other tokens than its own, or be none."""
    if weight.shape[2] != 1:
        return f"that reads {weight.shape[2]} of them"
    if "strides" in node.attributes and set(node.attributes["strides"].as_ints()) != {1}:
        return "that leaves some of them out"
    if "pads" in node.attributes and any(node.attributes["pads"].as_ints()):
        return "that adds some at the ends"
    return ""


def _whole(node: ir.Node, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give the weight float32[in, out] of all groups, or float32[channels] where each reads and gives one channel."""
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    flat = weight[:, :, 0]
    given, read = len(flat) // groups, flat.shape[1]
    if groups > 1 and given == read == 1:
        return np.ascontiguousarray(flat[:, 0])
    whole = np.zeros((read * groups, len(flat)), np.float32)
    for group in range(groups):
        outputs = slice(group * given, (group + 1) * given)
        whole[group * read : (group + 1) * read, outputs] = flat[outputs].T
    return whole


def _between_transposes(
    node: ir.Node, place: int, weight: NDArray[np.float32], bias: ir.Value | None, named: ir.Value | None
) -> ir.Value:
    """Write the product of operand `place` of a node with a weight, or with one factor a channel, and turn it back."""
    x, graph = node.inputs[place], node.graph
    if x is None or not isinstance(graph, ir.Graph):
        raise ValueError(f"{node.name}: reads nothing, or stands in no graph")
    stem = str(named.name if named is not None else node.name)
    shape = dims(x) or dims(node.outputs[0])
    batch, tokens = (shape[0], shape[2]) if shape is not None and len(shape) == 3 else (None, None)
    operator = "Mul" if weight.ndim == 1 else "MatMul"

    def written(op_type: str, inputs: list[ir.Value], name: str, width: int, is_turned: bool = False) -> ir.Value:
        value = add_node(node, op_type, inputs, name, {"perm": TURNED} if op_type == "Transpose" else None)
        value.shape = ir.Shape([batch, width, tokens] if is_turned else [batch, tokens, width])
        value.dtype = ir.DataType.FLOAT
        return value

    stored = add_constant(graph, f"{stem}/product", np.ascontiguousarray(weight))
    y = written("Transpose", [x], f"{node.name}/tokens", weight.shape[0])
    y = written(operator, [y, stored], f"{node.name}/product", weight.shape[-1])
    if bias is not None:
        y = written("Add", [y, bias], f"{node.name}/sum", weight.shape[-1])
    return written("Transpose", [y], f"{node.name}/channels", weight.shape[-1], is_turned=True)
