"""Join the integer Gemm nodes of query, key and value into one Gemm, with one Transpose of their heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.graph.edit import add_constant, add_node, constant, is_read_once, made_by, readers, replace_uses

JOINT = " + "  # joins the names of products in the name of their Gemm

_TO_FRONT = [0, 2, 1, 3]  # [batch, sequence, heads, size] to [batch, heads, sequence, size]
_TO_FRONT_TURNED = [0, 2, 3, 1]  # [batch, heads, size, sequence], for keys


@dataclass(frozen=True)
class _Projection:
    gemm: ir.Node
    tokens: ir.Value
    transpose: ir.Node
    shape: ir.Value
    heads: int
    size: int

    @property
    def is_turned(self) -> bool:
        return _perm(self.transpose) == _TO_FRONT_TURNED


def joined_heads(model: ir.Model) -> int:
    """Join integer Gemm nodes that read the same tokens and only split heads behind; give the number of joined groups.

    Before, two or three times::

        x ─ Gemm(DQ(codes), DQ(bias)) ─ Reshape[batch, sequence, heads, size] ─ Transpose

    After::

        x ─ Gemm ─ Reshape[batch, sequence, all heads, size] ─ Transpose ─ Reshape ─ Split ─┬─ query
                                                                                          ├─ Transpose ─ key
                                                                                          └─ value

    The same integers are multiplied and added, so the vectors stay bit-identical. The Reshape between Transpose and
    Split changes nothing: without it ONNX Runtime moves the Transpose behind the Split, back into one pass per
    projection; with it the key's second Transpose becomes part of the product with the query.
    """
    graph = model.graph
    groups: dict[tuple[ir.Value, int], list[_Projection]] = {}
    for node in graph:
        projection = _projection(node)
        if projection is not None:
            groups.setdefault((projection.tokens, projection.size), []).append(projection)
    joined = [group for group in groups.values() if len(group) > 1]
    for group in joined:
        _join(graph, group)
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    return len(joined)


def _projection(node: ir.Node) -> _Projection | None:
    """Match an integer Gemm with bias whose output is only split into heads and transposed."""
    if node.op_type != "Gemm" or len(node.inputs) != 3 or node.attributes:
        return None
    dequantized = [made_by(value, "DequantizeLinear") for value in node.inputs]
    if None in dequantized or any(_parameters(part) is None for part in dequantized[1:]):
        return None
    reshape, transpose = _only_reader(node, "Reshape"), None
    if reshape is not None:
        transpose = _only_reader(reshape, "Transpose")
    if reshape is None or transpose is None or _perm(transpose) not in (_TO_FRONT, _TO_FRONT_TURNED):
        return None
    target = made_by(reshape.inputs[1], "Concat")
    tail = constant(target.inputs[1]) if target is not None and len(target.inputs) == 2 else None
    if target is None or tail is None or tail.size != 2:
        return None
    tokens, batch_and_sequence = node.inputs[0], target.inputs[0]
    if tokens is None or batch_and_sequence is None:
        return None
    return _Projection(node, tokens, transpose, batch_and_sequence, int(tail[0]), int(tail[1]))


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
    before = first.gemm
    stem = JOINT.join(str(part.gemm.name) for part in group)
    weight, bias = (_joined_constant(graph, group, position, stem) for position in (1, 2))
    gemm = ir.node("Gemm", [first.tokens, weight, bias], name=stem)
    gemm.outputs[0].name = f"{stem}/sum"
    gemm.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(before, gemm)
    heads = [part.heads for part in group]
    all_heads = add_constant(graph, f"{stem}/heads", np.array([sum(heads), first.size], np.int64))
    shape = add_node(before, "Concat", [first.shape, all_heads], f"{stem}/shape", {"axis": 0})
    split_shape = add_constant(graph, f"{stem}/still", np.array([0, sum(heads), -1, first.size], np.int64))
    value = add_node(before, "Reshape", [gemm.outputs[0], shape], f"{stem}/split")
    value = add_node(before, "Transpose", [value], f"{stem}/front", {"perm": _TO_FRONT})
    value = add_node(before, "Reshape", [value, split_shape], f"{stem}/front_still")
    counts = add_constant(graph, f"{stem}/counts", np.array(heads, np.int64))
    split = ir.node(
        "Split", [value, counts], attributes={"axis": 1}, num_outputs=len(group), name=f"{stem}/projections"
    )
    graph.insert_before(before, split)
    for part, output in zip(group, split.outputs, strict=True):
        output.name = f"{part.gemm.name}/heads"
        result = output
        if part.is_turned:
            result = add_node(part.transpose, "Transpose", [output], f"{part.gemm.name}/turned", {"perm": [0, 1, 3, 2]})
        replace_uses(part.transpose.outputs[0], result)


def _joined_constant(graph: ir.Graph, group: list[_Projection], position: int, stem: str) -> ir.Value:
    """Concatenate weights or biases along the output channels, behind one DequantizeLinear."""
    nodes = [part.gemm.inputs[position].producer() for part in group]  # type: ignore[union-attr]
    parameters = [_parameters(node) for node in nodes]
    kind = ("", "weight", "bias")[position]
    inputs = []
    for arrays, suffix in zip(zip(*parameters, strict=True), ("codes", "scale", "zero_point"), strict=False):
        inputs.append(add_constant(graph, f"{stem}/{kind}/{suffix}", np.concatenate(arrays, axis=-1)))
    axis = {"axis": position % 2}  # channels are the second axis of weights and the only one of biases
    return add_node(group[0].gemm, "DequantizeLinear", inputs, f"{stem}/{kind}", axis)
