"""Quantise Conv, MaxPool, AveragePool, Concat and the mean over places, of maps [batch, rows, columns, channels]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.errors import Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import add_node, constant, dims, is_read_once, made_by, readers, replace_uses, required, scalar
from edgeq.graph.roles import Role
from edgeq.quantization import weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.convolution import cuts_off, rounded_kernel
from edgeq.quantization.integer.elementwise import arithmetic, rewritten
from edgeq.quantization.integer.walk import IntegerWalk
from edgeq.quantization.qdq import HEADROOM, QuantizedValue, int8_weight, int32_bias, symmetric
from edgeq.quantization.rewrites.patch_convolution import PATCHES
from edgeq.quantization.walk import move

PIXELS = Affine(1.0, -128, -128, 127)  # of what a camera gives, 0 to 255


def transpose(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise Transpose: of pixels from 0 to 255 exactly; around a convolution with it; else as it moves values."""
    if roles.has(node, Role.RAW_PIXELS):
        walk.builder.store(node, node.outputs[0], PIXELS, 8)
    elif not roles.has(node, Role.MAP_ORDER):
        move(walk, node)


def convolution(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise the input, weight, bias and output of a Conv between the two Transposes of its maps.

    A Relu, or a Clip from 0 up, that alone reads an 8-bit output is removed: the range behind it cuts off where it did.

    Raises:
        Unsupported: the weight is computed, or the convolution has groups of several channels.
    """
    builder = walk.builder
    before, after = _around(walk, node)
    weight = constant(node.inputs[1])
    if weight is None:
        raise Unsupported(builder.refusal(node, "a convolution with a computed weight has no integer form"))
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    if groups > 1 and weight.shape[1] > 1:
        found = f"a convolution with {groups} groups of {weight.shape[1]} channels has no integer form"
        raise Unsupported(builder.refusal(node, found))
    bits = 16 if node.name in walk.promoted else walk.spec.gemm_bits
    read = builder.read(before.inputs[0], bits, node)
    source, sizes = str(required(before.inputs[0]).name), (dims(before.inputs[0]) or [])[1:3]
    before.replace_input_with(0, read.value)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    bias = np.zeros(len(weight), np.float32) if bias is None else bias
    name = str(node.name)
    values, scales, bias = _rounded(walk, node, weight, bias, read.params.scale, source, sizes)
    node.resize_inputs(3)
    node.replace_input_with(1, int8_weight(node, f"{name}/weight", values, scales, axis=0))
    steps = np.float64(read.params.scale) * scales
    node.replace_input_with(2, int32_bias(node, name, f"{name}/bias", bias, steps))
    walk.products.append(name)
    output = after.outputs[0]
    following = readers(output)
    if is_read_once(output) and cuts_off(following[0]):  # what lies beyond is cut off, in 16 bits by a Relu
        builder.observed[str(output.name)] = builder.statistics(following[0].outputs[0])
        if bits == 8:
            walk.done.add(following[0])
            replace_uses(following[0].outputs[0], output)
    is_summed = bits == 8 and {use.op_type for use in readers(output)} <= {"Add", "Mul"}
    params = symmetric(builder.largest(output), 8) if is_summed else builder.range(output, bits)
    builder.store(after, output, params, bits)


def clip(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise a Clip from 0 to a limit as a Relu whose result saturates at the limit, or at what was observed.

    Raises:
        Unsupported: it begins elsewhere, and no rewrite wrote it.
    """
    builder, output = walk.builder, node.outputs[0]
    limit = scalar(node.inputs[2]) if len(node.inputs) > 2 else None
    if str(output.name) in builder.fixed or not cuts_off(node):
        rewritten(walk, node)
        return
    source = builder.home(node.inputs[0], node)
    largest = builder.largest(output) * (HEADROOM if source.bits == 16 else 1.0)
    top = largest if limit is None else min(largest, limit)
    relu = add_node(node, "Relu", [source.value], f"{node.name}/relu", like=output)
    params = symmetric(top, 16) if source.bits == 16 else builder.cover(0.0, top, 8)
    builder.quantized[output] = builder.store(required(relu.producer()), relu, params, source.bits)
    builder.observed[str(relu.name)] = builder.statistics(output)


def _rounded(
    walk: IntegerWalk,
    node: ir.Node,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    step: float,
    source: str,
    sizes: Sequence[int | str | None],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.floating]]:
    """Round the weights of a convolution: with error compensation (GPTQ) where its windows were observed.

    Pixels are far from 0 on average: rounding each weight to nearest would lose the colour of an area.
    """
    seen, bits = walk.builder.observed.get(f"{node.name}{PATCHES}"), walk.scheme.weight_bits
    if seen is None or seen.moment is None:
        values, scales, added = rounded_kernel(node, weight, bias, step, bits, walk.builder.observed.get(source), sizes)
        return values, scales, bias if added is None else added
    flat = np.ascontiguousarray(weight.reshape(len(weight), -1).T)
    values, scales = weight_rounding.rounded(flat, seen, step, bits)
    whole = bias + weight_rounding.lost_mean(flat, values, scales, seen)
    return np.ascontiguousarray(values.T).reshape(weight.shape), scales, whole


def pool(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise MaxPool and AveragePool between the two Transposes of their maps: the parameters stay.

    Raises:
        Unsupported: an average counts the zeros around the maps.
    """
    before, after = _around(walk, node)
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else [0]
    counts = node.attributes["count_include_pad"].as_int() if "count_include_pad" in node.attributes else 0
    if node.op_type == "AveragePool" and any(pads) and counts:
        raise Unsupported(walk.builder.refusal(node, "an average that counts padding has no integer form"))
    source = walk.builder.home(before.inputs[0], node)
    before.replace_input_with(0, source.value)
    walk.builder.store(after, after.outputs[0], source.params, source.bits)
    walk.builder.keep_statistics(after.outputs[0], source)


def _around(walk: IntegerWalk, node: ir.Node) -> tuple[ir.Node, ir.Node]:
    """Give the Transposes before and behind a window over maps."""
    before, following = made_by(node.inputs[0], "Transpose"), readers(node.outputs[0])
    is_map = len(following) == 1 and roles.has(before, Role.MAP_ORDER) and roles.has(following[0], Role.MAP_ORDER)
    if before is None or not is_map:
        found = f"{node.op_type} of something else than maps of an image has no integer form"
        raise Unsupported(walk.builder.refusal(node, found))
    return before, following[0]


def joined(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise Concat: all operands get one range, in 8 bits where convolutions alone read it, else in 16."""
    builder, output = walk.builder, node.outputs[0]
    seen = [_seen(walk, value) for value in node.inputs if value is not None]
    low, high = (np.array([edge([edge(getattr(item, name)) for item in seen])], np.float32) for edge, name in _EDGES)
    builder.observed[str(output.name)] = Statistics(low, high)
    bits = 8 if all(roles.has(use, Role.MAP_ORDER) for use in readers(output)) else 16
    params = builder.range(output, bits)
    for place, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(place, _as(walk, node, value, params, bits).value)
    builder.store(node, output, params, bits)


_EDGES = ((min, "minimum"), (max, "maximum"))


def _seen(walk: IntegerWalk, value: ir.Value) -> Statistics:
    array = constant(value)
    if array is None:
        return walk.builder.statistics(value)
    return Statistics(array.reshape(-1).min(keepdims=True), array.reshape(-1).max(keepdims=True))


def _as(walk: IntegerWalk, node: ir.Node, value: ir.Value, params: Affine, bits: int) -> QuantizedValue:
    """Give a tensor with these parameters."""
    if value in walk.of_sizes:
        return walk.builder.quantize_once(value, params, bits, node)
    if constant(value) is not None:
        return walk.builder.quantize(node, value, params, bits, f"{node.name}/{value.name}")
    home = walk.builder.home(value, node)
    if (home.params, home.bits) == (params, bits):
        return home
    return walk.builder.requantize(home, params, bits, f"{value.name}/of_{node.outputs[0].name}")


def is_mean_of_places(node: ir.Node) -> bool:
    """Tell whether a ReduceMean is over tokens, or over the rows and columns of maps, not over channels."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and axes.reshape(-1).tolist() in ([1], [1, 2])


def mean(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise ReduceMean over tokens, or over rows and columns, in 16 bits."""
    arithmetic(walk, node)


def pad(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise Pad: the parameters stay, and must hold what is put around."""
    source = walk.builder.home(node.inputs[0], node)
    level = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    value = 0.0 if level is None else float(level)
    code = value / source.params.scale + source.params.zero_point
    if code != round(code) or not source.params.low <= code <= source.params.high:
        raise Unsupported(walk.builder.refusal(node, f"pads with {value:g}, which its operand's integers do not hold"))
    move(walk, node)


def skip_normalized_pixels(walk: IntegerWalk) -> None:
    """Leave out what takes normalised pixels to those from 0 to 255: a runtime is given these."""
    for node in walk.builder.graph:
        if roles.has(node, Role.RAW_PIXELS) and node.op_type != "Transpose":
            walk.done.add(required(node))
