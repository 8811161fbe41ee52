"""Quantise convolutions: the maps that they read and give, their weights and their biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.errors import EdgeqError
from edgeq.graph.edit import (
    add_constant,
    add_node,
    add_node_after,
    constant,
    is_read_once,
    readers,
    replace_uses,
    scalar,
)
from edgeq.quantization import affine, ranges, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.records import Scheme

_LARGEST_BIAS = 2.0**30


def convolutions(graph: ir.Graph) -> Iterator[ir.Node]:
    """Give every convolution with stored weights, in graph order."""
    for node in graph:
        if node.op_type == "Conv" and node.inputs[0] is not None and constant(node.inputs[1]) is not None:
            yield node


def map_tensors(graph: ir.Graph) -> list[str]:
    """Name what convolutions read and, behind an activation that only cuts off, give."""
    names: dict[str, None] = {}
    for node in convolutions(graph):
        names[str(node.inputs[0].name)] = None  # type: ignore[union-attr]
        names[str(_settled(node).name)] = None
    return list(names)


def _settled(node: ir.Node) -> ir.Value:
    """Give the convolution's output, behind the Relu or Clip that alone reads it."""
    output = node.outputs[0]
    after = readers(output)
    return after[0].outputs[0] if is_read_once(output) and _cuts_off(after[0]) else output


def _cuts_off(node: ir.Node) -> bool:
    """Tell whether codes from zero up do what the node does."""
    return node.op_type == "Relu" or (node.op_type == "Clip" and len(node.inputs) > 1 and scalar(node.inputs[1]) == 0.0)


def quantize_convolutions(graph: ir.Graph, observed: Mapping[str, Statistics], scheme: Scheme) -> list[str]:
    """Put QuantizeLinear and DequantizeLinear around every convolution, and give their names.

    Before::

        x ─ Conv(W, b) ─ Relu ─ y

    After::

        x ─ Q ─ DQ ─ Conv(DQ(W codes), DQ(int32 b codes)) ─ Q ─ DQ ─ y

    Runtimes sum in integers only where the output has codes, too. A Relu, or a Clip from 0 up, goes: codes that begin
    at zero and end at the largest value observed behind it cut off where it did. What a convolution gives is read
    dequantised by everything; a sum that a convolution reads stays as it is for the next sum, so that the residual
    stream is not rounded again and again.

    Raises:
        EdgeqError: a map has no statistics.
    """
    found = [node for node in convolutions(graph) if node.name not in scheme.promoted]
    codes: dict[ir.Value, Affine] = {}
    for node in found:
        for value in (node.inputs[0], _settled(node)):
            if value is not None and value not in codes:
                codes[value] = _codes(value, observed, scheme)
    given = {_settled(node) for node in found}
    for value in codes:
        _qdq(graph, value, None if value in given else found, codes[value], scheme)
    for node in found:
        _without_activation(node)
        step = scalar(node.inputs[0].producer().inputs[1])  # type: ignore[union-attr]
        _quantize_weights(graph, node, float(step or 0.0), scheme)
    return [str(node.name) for node in found]


def _codes(value: ir.Value, observed: Mapping[str, Statistics], scheme: Scheme) -> Affine:
    name = str(value.name)
    if name not in observed:
        raise EdgeqError(f"{name}: read or given by a convolution, but the calibration has no statistics of it")
    low, high = ranges.choose(observed[name], scheme)
    return affine.asymmetric(low, high, scheme.activation_bits, scheme.activations_signed)


def _qdq(graph: ir.Graph, value: ir.Value, by: list[ir.Node] | None, codes: Affine, scheme: Scheme) -> None:
    """Let these nodes, or all, read the dequantised codes of a map."""
    uses = [use for use in value.uses() if by is None or use.node in by]
    dtype = np.int8 if scheme.activations_signed else np.uint8
    scale = add_constant(graph, f"{value.name}/scale", np.array(codes.scale, np.float32))
    zero_point = add_constant(graph, f"{value.name}/zero_point", np.array(codes.zero_point, dtype))
    maker = value.producer()
    name = f"{value.name}/quantized"
    inputs = [value, scale, zero_point]
    if maker is None:
        quantized = add_node(next(iter(graph)), "QuantizeLinear", inputs, name)
    else:
        quantized = add_node_after(maker, "QuantizeLinear", inputs, name)
    node = quantized.producer()
    if node is None:
        raise EdgeqError(f"{name}: has no node. This is a defect of edgeq; please report it.")
    back = add_node_after(node, "DequantizeLinear", [quantized, scale, zero_point], f"{value.name}/dequantized")
    for use in uses:
        use.node.replace_input_with(use.idx, back)


def _without_activation(node: ir.Node) -> None:
    """Drop a Relu or Clip between the convolution and its codes."""
    after = readers(node.outputs[0])
    if len(after) == 1 and _cuts_off(after[0]):
        replace_uses(after[0].outputs[0], node.outputs[0])
        if after[0].graph is not None:
            after[0].graph.remove(after[0], safe=True)


def _quantize_weights(graph: ir.Graph, node: ir.Node, step: float, scheme: Scheme) -> None:
    weight = constant(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if weight is None:
        return
    codes, scales = _rounded(weight, bias, step, scheme.weight_bits)
    name = str(node.inputs[1].name)  # type: ignore[union-attr]
    stored = [
        add_constant(graph, f"{name}/codes", codes), add_constant(graph, f"{name}/scale", scales),
        add_constant(graph, f"{name}/zero_point", np.zeros(scales.shape, np.int8)),
    ]  # fmt: skip
    node.replace_input_with(1, add_node(node, "DequantizeLinear", stored, f"{node.name}/weight", {"axis": 0}))
    if bias is None:
        return
    steps = (np.float32(step) * scales).astype(np.float32)
    sums = np.rint(bias.astype(np.float64) / steps).astype(np.int32)
    stem = str(node.inputs[2].name)  # type: ignore[union-attr]
    inputs = [add_constant(graph, f"{stem}/codes", sums), add_constant(graph, f"{stem}/scale", steps)]
    node.replace_input_with(2, add_node(node, "DequantizeLinear", inputs, f"{node.name}/bias", {"axis": 0}))


def _rounded(
    weight: NDArray[np.float32], bias: NDArray[np.float32] | None, step: float, bits: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round weights, float32[out, in, height, width], per output channel; a bias must fit 32 bits in steps of sums.

    A channel that batch normalisation has all but switched off has tiny weights beside its bias.
    """
    flat = weight.reshape(len(weight), -1).T
    scales = weight_rounding.nearest(flat, bits)[1]
    if bias is not None:
        scales = np.maximum(scales, (np.abs(bias) / (_LARGEST_BIAS * step)).astype(np.float32))
    limit = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(flat / scales), -limit, limit).astype(np.int8)
    return np.ascontiguousarray(codes.T).reshape(weight.shape), scales
