"""Join the integer products of query, key and value into one, with one Transpose of their heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.graph.edit import add_constant, add_node, constant, is_read_once, made_by, readers, replace_uses, required
from edgeq.graph.linear import bias_of

JOINT = " + "  # joins the names of products in the name of their Gemm

_TO_FRONT = [0, 2, 1, 3]  # [batch, sequence, heads, size] to [batch, heads, sequence, size]
_TO_FRONT_TURNED = [0, 2, 3, 1]  # [batch, heads, size, sequence], for keys


@dataclass(frozen=True)
class _Projection:
    """Hold one product with what follows it.

    Attributes:
        product: a Gemm with an integer bias, or a MatMul.
        factor: what the tokens that a MatMul gives are multiplied by; None for a Gemm.
        bias: codes in a DequantizeLinear for a Gemm; float32 behind a MatMul.
        transpose: of the heads.
        shape: of the Reshape in front: [batch, sequence], computed; None where it is constant and begins with [0, 0].
        heads: their number.
        size: of a head.
    """

    product: ir.Node
    factor: ir.Value | None
    bias: ir.Value
    transpose: ir.Node
    shape: ir.Value | None
    heads: int
    size: int

    @property
    def tokens(self) -> ir.Value:
        """Give what the product reads."""
        return required(self.product.inputs[0])

    @property
    def is_turned(self) -> bool:
        return _perm(self.transpose) == _TO_FRONT_TURNED


def joined_heads(model: ir.Model) -> int:
    """Join integer products that read the same tokens and only split heads behind; give the number of joined groups.

    Before, two or three times::

        x ─ Gemm(DQ(codes), DQ(bias)) ─ Reshape[batch, sequence, heads, size] ─ Transpose

    After::

        x ─ Gemm ─ Reshape[batch, sequence, all heads, size] ─ Transpose ─ Reshape ─ Split ─┬─ query
                                                                                          ├─ Transpose ─ key
                                                                                          └─ value

    Where each token has a scale of its own, MatMul, Mul by the scale and Add of the bias stand in place of the Gemm.
    The same integers are multiplied and added, so the vectors stay bit-identical. The Reshape between Transpose and
    Split changes nothing: without it ONNX Runtime moves the Transpose behind the Split, back into one pass per
    projection; with it the key's second Transpose becomes part of the product with the query.
    """
    graph = model.graph
    groups: dict[tuple[ir.Value, ir.Value | None, int], list[_Projection]] = {}
    for node in graph:
        projection = _projection(node)
        if projection is not None:
            groups.setdefault((projection.tokens, projection.factor, projection.size), []).append(projection)
    joined = [group for group in groups.values() if len(group) > 1]
    for group in joined:
        _join(graph, group)
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    return len(joined)


def _projection(node: ir.Node) -> _Projection | None:
    """Match an integer product with bias whose output is only split into heads and transposed."""
    found = _with_bias(node)
    if found is None:
        return None
    end, factor, bias = found
    reshape, transpose = _only_reader(end, "Reshape"), None
    if reshape is not None:
        transpose = _only_reader(reshape, "Transpose")
    if reshape is None or transpose is None or _perm(transpose) not in (_TO_FRONT, _TO_FRONT_TURNED):
        return None
    target, whole = made_by(reshape.inputs[1], "Concat"), constant(reshape.inputs[1])
    if whole is not None and whole.size == 4 and whole[:2].tolist() == [0, 0]:
        return _Projection(node, factor, bias, transpose, None, int(whole[2]), int(whole[3]))
    tail = constant(target.inputs[1]) if target is not None and len(target.inputs) == 2 else None
    if target is None or tail is None or tail.size != 2 or target.inputs[0] is None:
        return None
    return _Projection(node, factor, bias, transpose, target.inputs[0], int(tail[0]), int(tail[1]))


def _with_bias(node: ir.Node) -> tuple[ir.Node, ir.Value | None, ir.Value] | None:
    """Give the node that makes an integer product with its bias, what it is multiplied by, and the bias."""
    dequantized = [made_by(value, "DequantizeLinear") for value in node.inputs]
    if node.op_type not in ("Gemm", "MatMul") or None in dequantized or node.attributes:
        return None
    if any(_parameters(part) is None for part in dequantized[1:]):
        return None
    if node.op_type == "Gemm":
        return None if len(node.inputs) != 3 else (node, None, required(node.inputs[2]))
    scaled = _only_reader(node, "Mul")
    add = _only_reader(scaled, "Add") if scaled is not None else None
    found = bias_of(add) if add is not None else None
    if scaled is None or add is None or found is None or found[1].ndim != 1:
        return None
    factor = next(value for value in scaled.inputs if value is not node.outputs[0])
    return add, required(factor), required(add.inputs[found[0]])


def _only_reader(node: ir.Node, op_type: str) -> ir.Node | None:
    if not is_read_once(node.outputs[0]):
        return None
    reader = readers(node.outputs[0])[0]
    return reader if reader.op_type == op_type else None


def _perm(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints())


def _parameters(dequantize: ir.Node | None) -> list[NDArray[np.generic]] | None:
    """Give a DequantizeLinear's constant values, scales and, if present, zero points."""
    if dequantize is None:
        return None
    arrays = [constant(value) for value in dequantize.inputs]
    found = [array for array in arrays if array is not None]
    return found if len(found) == len(arrays) and all(array.ndim for array in found) else None


def _join(graph: ir.Graph, group: list[_Projection]) -> None:
    first = group[0]
    before = first.product
    stem = JOINT.join(str(part.product.name) for part in group)
    sums = _product(graph, group, stem)
    heads = [part.heads for part in group]
    if first.shape is None:
        shape = add_constant(graph, f"{stem}/heads", np.array([0, 0, sum(heads), first.size], np.int64))
    else:
        all_heads = add_constant(graph, f"{stem}/heads", np.array([sum(heads), first.size], np.int64))
        shape = add_node(before, "Concat", [first.shape, all_heads], f"{stem}/shape", {"axis": 0})
    split_shape = add_constant(graph, f"{stem}/still", np.array([0, sum(heads), -1, first.size], np.int64))
    value = add_node(before, "Reshape", [sums, shape], f"{stem}/split")
    value = add_node(before, "Transpose", [value], f"{stem}/front", {"perm": _TO_FRONT})
    value = add_node(before, "Reshape", [value, split_shape], f"{stem}/front_still")
    counts = add_constant(graph, f"{stem}/counts", np.array(heads, np.int64))
    split = ir.node(
        "Split", [value, counts], attributes={"axis": 1}, num_outputs=len(group), name=f"{stem}/projections"
    )
    graph.insert_before(before, split)
    for part, output in zip(group, split.outputs, strict=True):
        output.name = f"{part.product.name}/heads"
        result = output
        if part.is_turned:
            result = add_node(
                part.transpose, "Transpose", [output], f"{part.product.name}/turned", {"perm": [0, 1, 3, 2]}
            )
        replace_uses(part.transpose.outputs[0], result)


def _product(graph: ir.Graph, group: list[_Projection], stem: str) -> ir.Value:
    """Write the joined product with its bias in front of the first one."""
    first, before = group[0], group[0].product
    weight = _joined_codes(graph, [part.product.inputs[1] for part in group], before, f"{stem}/weight", 1)
    inputs = [first.tokens, weight]
    if first.factor is None:
        inputs.append(_joined_codes(graph, [part.bias for part in group], before, f"{stem}/bias", 0))
    node = ir.node(before.op_type, inputs, name=stem)
    node.outputs[0].name = f"{stem}/sum"
    node.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(before, node)
    if first.factor is None:
        return node.outputs[0]
    real = add_node(before, "Mul", [node.outputs[0], first.factor], f"{stem}/scaled_back")
    biases = [required(constant(part.bias)) for part in group]
    return add_node(
        before, "Add", [real, add_constant(graph, f"{stem}/bias", np.concatenate(biases))], f"{stem}/biased"
    )


def _joined_codes(
    graph: ir.Graph, values: list[ir.Value | None], before: ir.Node, name: str, axis: int
) -> ir.Value:  # fmt: skip
    """Concatenate dequantised weights or biases along the output channels, behind one DequantizeLinear."""
    parameters = [_parameters(required(value).producer()) for value in values]
    found = [arrays for arrays in parameters if arrays is not None]
    inputs = [
        add_constant(graph, f"{name}/{suffix}", np.concatenate(arrays, axis=-1))
        for arrays, suffix in zip(zip(*found, strict=True), ("codes", "scale", "zero_point"), strict=False)
    ]
    return add_node(before, "DequantizeLinear", inputs, name, {"axis": axis})
