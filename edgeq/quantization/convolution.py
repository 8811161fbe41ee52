"""Quantise Conv: the feature maps that it reads and gives to int8 or uint8, its weights to int8, its bias to int32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.graph.edit import constant, dims, is_read_once, readers, replace_uses, scalar
from edgeq.quantization import affine, ranges, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import QdqBuilder, int8_weight, int32_bias
from edgeq.records import Scheme

_LARGEST_BIAS = 2.0**30


def convolutions(graph: ir.Graph) -> Iterator[ir.Node]:
    """Give every Conv with a stored weight, in graph order."""
    for node in graph:
        if node.op_type == "Conv" and node.inputs[0] is not None and constant(node.inputs[1]) is not None:
            yield node


def map_tensors(graph: ir.Graph) -> list[str]:
    """Name the tensors that Conv nodes read and, behind a Relu or Clip from 0, give."""
    names: dict[str, None] = {}
    for node in convolutions(graph):
        names[str(node.inputs[0].name)] = None  # type: ignore[union-attr]
        names[str(_output_map(node).name)] = None
    return list(names)


def kernel_inputs(graph: ir.Graph) -> tuple[list[str], list[str]]:
    """Name the maps of images that Conv nodes read, and those among them that one with a kernel of 1 reads.

    Of the first a mean is needed, for the bias, of the second a second moment, to round their weights as a product's.
    """
    maps: dict[str, None] = {}
    pointwise: dict[str, None] = {}
    for node in convolutions(graph):
        weight, name = constant(node.inputs[1]), str(node.inputs[0].name)  # type: ignore[union-attr]
        if weight is not None and weight.ndim == 4:
            maps[name] = None
            if _is_pointwise(node, weight):
                pointwise[name] = None
    return list(maps), list(pointwise)


def _is_pointwise(node: ir.Node, weight: NDArray[np.float32]) -> bool:
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return weight.shape[2:] == (1, 1) and group == 1


def _output_map(node: ir.Node) -> ir.Value:
    """Give a Conv's output, or that of the Relu or Clip that alone reads it."""
    output = node.outputs[0]
    after = readers(output)
    return after[0].outputs[0] if is_read_once(output) and cuts_off(after[0]) else output


def cuts_off(node: ir.Node) -> bool:
    """Tell whether a node only cuts off below 0, as quantising to a range from 0 up does."""
    return node.op_type == "Relu" or (node.op_type == "Clip" and len(node.inputs) > 1 and scalar(node.inputs[1]) == 0.0)


def quantize_convolutions(builder: QdqBuilder, scheme: Scheme) -> list[str]:
    """Put QuantizeLinear and DequantizeLinear around every Conv with a stored weight, and give their names.

    Before::

        x ─ Conv(W, b) ─ Relu ─ y

    After::

        x ─ Q ─ DQ ─ Conv(DQ(int8 W), DQ(int32 b)) ─ Q ─ DQ ─ y

    Runtimes sum in integers only where the output is quantised, too. A Relu, or a Clip from 0 up, is removed: a range
    from 0 to the largest value observed behind it cuts off where it did. Every reader of a Conv's output reads it
    dequantised; a sum that a Conv reads stays float for the next sum, so that the residual stream is not rounded again
    and again.

    Raises:
        EdgeqError: a feature map has no statistics.
    """
    found = [node for node in convolutions(builder.graph) if node.name not in (*scheme.promoted, *scheme.floats)]
    params: dict[ir.Value, Affine] = {}
    for node in found:
        for value in (node.inputs[0], _output_map(node)):
            if value is not None and value not in params:
                limits = ranges.choose(builder.statistics(value), scheme)
                params[value] = affine.asymmetric(*limits, scheme.activation_bits, scheme.activations_signed)
    given = {_output_map(node) for node in found}
    seen = {node: builder.observed.get(str(node.inputs[0].name)) for node in found}  # type: ignore[union-attr]
    sizes = {node: (dims(node.inputs[0]) or [])[2:] for node in found}
    for value in params:
        _quantize_map(builder, value, None if value in given else found, params[value], scheme.activation_bits)
    for node in found:
        _without_activation(node)
        step = scalar(node.inputs[0].producer().inputs[1])  # type: ignore[union-attr]
        _quantize_weights(node, float(step or 0.0), scheme, seen[node], sizes[node])
    return [str(node.name) for node in found]


def _quantize_map(builder: QdqBuilder, value: ir.Value, by: list[ir.Node] | None, params: Affine, bits: int) -> None:
    """Let these nodes, or all, read the quantised feature map."""
    uses = [use for use in value.uses() if by is None or use.node in by]
    maker, name = value.producer(), str(value.name)
    if maker is None:
        back = builder.quantize(next(iter(builder.graph)), value, params, bits, name).value
    else:
        back = builder.pair(maker, value, name, params, bits)
    for use in uses:
        use.node.replace_input_with(use.idx, back)


def _without_activation(node: ir.Node) -> None:
    """Remove a Relu or Clip between Conv and QuantizeLinear."""
    after = readers(node.outputs[0])
    if len(after) == 1 and cuts_off(after[0]):
        replace_uses(after[0].outputs[0], node.outputs[0])
        if after[0].graph is not None:
            after[0].graph.remove(after[0], safe=True)


def _quantize_weights(
    node: ir.Node, step: float, scheme: Scheme, seen: Statistics | None, sizes: Sequence[int | str | None]
) -> None:
    """Quantise the weight of a Conv to int8 and its bias to int32, by output channel."""
    weight, names = constant(node.inputs[1]), [str(value.name) for value in node.inputs if value is not None]
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if weight is None:
        return
    values, scales, bias = rounded_kernel(node, weight, bias, step, scheme.weight_bits, seen, sizes)
    node.replace_input_with(1, int8_weight(node, names[1], values, scales, axis=0))
    if bias is not None:
        steps = (np.float32(step) * scales).astype(np.float32)
        node.replace_input_with(2, int32_bias(node, str(node.name), names[2], bias, steps))


def rounded_kernel(
    node: ir.Node, weight: NDArray[np.float32], bias: NDArray[np.float32] | None, step: float, bits: int,
    seen: Statistics | None, sizes: Sequence[int | str | None],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]:  # fmt: skip
    """Round weights, float32[out, in, height, width], to int8 by output channel, so that the bias fits int32.

    With a kernel of 1 and an observed second moment, rounding is compensated (GPTQ); else it is to nearest. What it
    takes from the mean of the output goes into the bias (bias correction: Nagel et al. 2019, Data-free quantization).
    A channel that batch normalisation has all but switched off has tiny weights beside its bias.

    Args:
        node: the Conv.
        weight: of the Conv.
        bias: float32[out], or None.
        step: the scale of the input.
        bits: of the integers, at most 8.
        seen: statistics of the input, if there are any.
        sizes: rows and columns of the input.

    Returns:
        Integers int8[out, in, height, width], scales float32[out], and the bias with the lost mean, where it has one.
    """
    flat = weight.reshape(len(weight), -1).T
    scales = weight_rounding.nearest(flat, bits)[1]
    fitting = scales if bias is None else np.maximum(scales, (np.abs(bias) / (_LARGEST_BIAS * step)).astype(np.float32))
    is_compensated = _is_pointwise(node, weight) and seen is not None and seen.moment is not None
    if is_compensated and np.array_equal(fitting, scales):
        values = weight_rounding.rounded(np.ascontiguousarray(flat), seen, step, bits)[0]
    else:
        limit = 2 ** (bits - 1) - 1
        values = np.clip(np.rint(flat / fitting), -limit, limit).astype(np.int8)
    if bias is not None and seen is not None and seen.mean is not None:
        lost = (flat - values * fitting.astype(np.float64)).T.reshape(weight.shape)
        lost = (lost * _coverage(node, weight, sizes)).sum(axis=(2, 3))
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        means = np.repeat(seen.mean.reshape(groups, -1), len(weight) // groups, axis=0)
        bias = (bias + (lost * means).sum(axis=1)).astype(np.float32)
    return np.ascontiguousarray(values.T).reshape(weight.shape), fitting, bias


def _coverage(
    node: ir.Node, weight: NDArray[np.float32], sizes: Sequence[int | str | None]
) -> NDArray[np.float64] | float:
    """Give in what share of the windows each place of the kernel lies inside of the maps, float64[height, width].

    On small maps most of a window is padding, which has no mean.
    """
    shares = []
    pads = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else [0] * (2 * (weight.ndim - 2))
    for axis, (size, wide) in enumerate(zip(sizes, weight.shape[2:], strict=False)):
        step, hole = (
            int(node.attributes[name].as_ints()[axis]) if name in node.attributes else 1
            for name in ("strides", "dilations")
        )
        if not isinstance(size, int):
            return 1.0
        before, after = pads[axis], pads[axis + weight.ndim - 2]
        count = (size + before + after - (wide - 1) * hole - 1) // step + 1
        places = np.arange(count)[:, None] * step - before + np.arange(wide) * hole
        shares.append(((places >= 0) & (places < size)).mean(axis=0))
    return np.outer(*shares) if len(shares) == 2 else 1.0
