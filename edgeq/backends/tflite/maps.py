"""Write Conv, MaxPool, AveragePool, Concat, Pad and the mean over places, on [1, rows, columns, channels].

ONNX's convolutions stand between two Transposes there, which are written with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from edgeq.backends.tflite.emitter import OPERATOR, OPTIONS, Emitter
from edgeq.backends.tflite.writer import QuantParams, Tensor
from edgeq.errors import LoweringFailed
from edgeq.graph import roles
from edgeq.graph.edit import constant, made_by, readers, required
from edgeq.graph.roles import Role

# operator -> its version for int8 and for int16
_CONV, _DEPTHWISE, _PAD = {"int8": 3, "int16": 4}, {"int8": 3, "int16": 5}, {"int8": 2, "int16": 4}
_POOL, _CONCATENATION, _MEAN = {"int8": 2, "int16": 3}, {"int8": 2, "int16": 3}, 2


def pixels(emit: Emitter, node: ir.Node) -> None:
    """Write the QuantizeLinear of pixels as QUANTIZE of the input, uint8[1, rows, columns, 3], to int8."""
    if emit.pixels is None:
        raise LoweringFailed(f"{node.name}: there are no pixels")
    emit.requantized(emit.pixels, emit.result(node, emit.pixels.shape))


def convolution(emit: Emitter, node: ir.Node) -> None:
    """Write Conv as CONV_2D or DEPTHWISE_CONV_2D, behind a PAD where its padding is not what TFLite calls SAME."""
    before, after = required(made_by(node.inputs[0], "Transpose")), readers(node.outputs[0])[0]
    source, weight = emit.read(before.inputs[0]), made_by(node.inputs[1], "DequantizeLinear")
    bias = made_by(node.inputs[2], "DequantizeLinear")
    stored = constant(weight.inputs[0]) if weight is not None else None
    values = constant(bias.inputs[0]) if bias is not None else None
    if weight is None or bias is None or stored is None or values is None:
        raise LoweringFailed(f"{node.name}: its weight or its bias is no constant")
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    is_depthwise = groups > 1
    kernel = _numbers(node, "kernel_shape", list(stored.shape[2:]))
    strides, dilations = _numbers(node, "strides", [1, 1]), _numbers(node, "dilations", [1, 1])
    span = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    name = str(required(weight.inputs[0]).name)
    source, padding, shape = _padded(emit, node, source, span, strides)
    order = (1, 2, 3, 0) if is_depthwise else (0, 2, 3, 1)
    array = np.ascontiguousarray(stored.transpose(order))
    if is_depthwise:  # [out, 1, height, width] to [1, height, width, out]
        array = np.ascontiguousarray(stored.transpose(1, 2, 3, 0))
    params = emit.params(weight)
    matrix = emit.out.constant(name, array, QuantParams(params.scales, params.zero_points, 3 if is_depthwise else 0))
    dtype = np.int64 if source.dtype == "int16" else np.int32
    added = emit.out.constant(str(required(bias.inputs[0]).name), values.astype(dtype), emit.params(bias))
    options: Any = schema.DepthwiseConv2DOptionsT() if is_depthwise else schema.Conv2DOptionsT()
    options.padding = padding
    options.strideH, options.strideW = strides
    options.dilationHFactor, options.dilationWFactor = dilations
    kind, builtin, versions = OPTIONS.Conv2DOptions, OPERATOR.CONV_2D, _CONV
    if is_depthwise:
        options.depthMultiplier = len(stored) // groups
        kind, builtin, versions = OPTIONS.DepthwiseConv2DOptions, OPERATOR.DEPTHWISE_CONV_2D, _DEPTHWISE
    emit.write(
        after.outputs[0], (1, *shape, len(stored)), builtin, versions[source.dtype], [source, matrix, added],
        (kind, options),
    )  # fmt: skip


def pool(emit: Emitter, node: ir.Node) -> None:
    """Write MaxPool and AveragePool; what is padded around a maximum is the lowest integer."""
    before, after = required(made_by(node.inputs[0], "Transpose")), readers(node.outputs[0])[0]
    source, is_maximum = emit.read(before.inputs[0]), node.op_type == "MaxPool"
    kernel, strides = _numbers(node, "kernel_shape", []), _numbers(node, "strides", [1, 1])
    if set(_numbers(node, "dilations", [1, 1])) != {1}:
        raise LoweringFailed(f"{node.name}: TFLite has no pooling with dilations")
    ceil = "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int()
    if ceil:
        raise LoweringFailed(f"{node.name}: TFLite has no pooling whose last window lies partly outside")
    lowest = int(np.iinfo(source.dtype).min) if is_maximum else None
    source, padding, shape = _padded(emit, node, source, kernel, strides, lowest)
    options = schema.Pool2DOptionsT()
    options.padding = padding
    options.strideH, options.strideW = strides
    options.filterHeight, options.filterWidth = kernel
    builtin = OPERATOR.MAX_POOL_2D if is_maximum else OPERATOR.AVERAGE_POOL_2D
    table = (OPTIONS.Pool2DOptions, options)
    emit.write(after.outputs[0], (1, *shape, source.shape[3]), builtin, _POOL[source.dtype], [source], table)


def _numbers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return [int(number) for number in node.attributes[name].as_ints()] if name in node.attributes else default


def _padded(
    emit: Emitter, node: ir.Node, source: Tensor, span: Sequence[int], strides: Sequence[int], lowest: int | None = None
) -> tuple[Tensor, int, tuple[int, int]]:
    """Give what a window reads, how TFLite pads it, and the rows and columns of the result.

    Args:
        emit: of the signature.
        node: the window's.
        source: maps, [1, rows, columns, channels].
        span: of the window, rows and columns.
        strides: of the window.
        lowest: the integer to pad with, where it is not the zero point.
    """
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if automatic not in ("NOTSET", "VALID"):
        raise LoweringFailed(f"{node.name}: auto_pad is {automatic}; pads in numbers are needed")
    pads = _numbers(node, "pads", [0, 0, 0, 0])
    sizes = source.shape[1:3]
    around = list(zip(pads[:2], pads[2:], strict=True))
    shape = tuple(
        (size + sum(pair) - wide) // step + 1
        for size, pair, wide, step in zip(sizes, around, span, strides, strict=True)
    )
    rows, columns = shape
    if not any(pads):
        return source, schema.Padding.VALID, (rows, columns)
    if [_same(*item) for item in zip(sizes, span, strides, strict=True)] == around:
        return source, schema.Padding.SAME, (rows, columns)
    wide = [(0, 0), *around, (0, 0)]
    return _pad(emit, source, wide, lowest), schema.Padding.VALID, (rows, columns)


def _same(size: int, span: int, step: int) -> tuple[int, int]:
    """Give how many rows TFLite's SAME puts before and behind."""
    total = max((-(-size // step) - 1) * step + span - size, 0)
    return total // 2, total - total // 2


def _pad(emit: Emitter, source: Tensor, around: Sequence[tuple[int, int]], lowest: int | None) -> Tensor:
    name = f"pads_{'_'.join(str(number) for pair in around for number in pair)}"
    pads = emit.out.constant(name, np.array(around, np.int32))
    shape = tuple(size + sum(pair) for size, pair in zip(source.shape, around, strict=True))
    result = emit.out.unnamed(shape, source.dtype, source.params)
    if lowest is None:
        options = (OPTIONS.PadOptions, schema.PadOptionsT())
        return emit.out.operator(OPERATOR.PAD, _PAD[source.dtype], [source, pads], result, options)
    level = emit.out.constant(f"lowest_{source.dtype}_{name}", np.array([lowest], source.dtype), source.params)
    return emit.out.operator(
        OPERATOR.PADV2,
        _PAD[source.dtype],
        [source, pads, level],
        result,
        (OPTIONS.PadV2Options, schema.PadV2OptionsT()),
    )


def pad(emit: Emitter, node: ir.Node) -> None:
    """Write Pad of one plane behind the channels as CONCATENATION with a constant, and Pad with zeros as PAD."""
    source, pads = emit.read(node.inputs[0]), constant(node.inputs[1])
    level = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if pads is None:
        raise LoweringFailed(f"{node.name}: its pads are computed")
    rank = len(source.shape)
    around = [(int(pads[axis]), int(pads[rank + axis])) for axis in range(rank)]
    shape = tuple(size + sum(pair) for size, pair in zip(source.shape, around, strict=True))
    quantizer = emit.quantizer(node.outputs[0])
    if level is None or not level:
        stored = emit.out.constant(f"{node.name}/pads", np.array(around, np.int32))
        options = (OPTIONS.PadOptions, schema.PadOptionsT())
        emit.write(node.outputs[0], shape, OPERATOR.PAD, _PAD[source.dtype], [source, stored], options)
        return
    if around[:-1] != [(0, 0)] * (rank - 1) or around[-1][0]:
        raise LoweringFailed(f"{node.name}: puts {float(level):g} elsewhere than behind the channels")
    params = emit.params(quantizer)
    code = int(np.rint(float(level) / params.scales[0])) + params.zero_points[0]
    plane = np.full((*source.shape[:-1], around[-1][1]), code, source.dtype)
    held = emit.out.constant(f"{node.name}/plane", plane, params)
    _concatenation(emit, node.outputs[0], [source, held], rank - 1)


def concat(emit: Emitter, node: ir.Node) -> None:
    """Write Concat of quantised tensors with one scale; one of sizes is written where it is read."""
    if any(made_by(value, "DequantizeLinear") is None for value in node.inputs):
        return
    operands = [emit.read(value) for value in node.inputs]
    _concatenation(emit, node.outputs[0], operands, node.attributes["axis"].as_int() % len(operands[0].shape))


def _concatenation(emit: Emitter, value: ir.Value, operands: Sequence[Tensor], axis: int) -> None:
    options = schema.ConcatenationOptionsT()
    options.axis = axis
    size = sum(operand.shape[axis] for operand in operands)
    shape = (*operands[0].shape[:axis], size, *operands[0].shape[axis + 1 :])
    version = _CONCATENATION[operands[0].dtype]
    result = emit.write(
        value, shape, OPERATOR.CONCATENATION, version, operands, (OPTIONS.ConcatenationOptions, options)
    )
    if len({(operand.dtype, operand.params) for operand in (*operands, result)}) > 1:
        raise LoweringFailed(f"{value.name}: its operands and its result have different codes")


def mean(emit: Emitter, node: ir.Node) -> None:
    """Write ReduceMean over tokens, or over rows and columns, as MEAN."""
    axes, source = constant(node.inputs[1]), emit.read(node.inputs[0])
    if axes is None:
        raise LoweringFailed(f"{node.name}: its axes are computed")
    given = [int(axis) for axis in axes.reshape(-1)]
    keeps = bool(node.attributes["keepdims"].as_int()) if "keepdims" in node.attributes else True
    stored = emit.out.constant(f"axes_{'_'.join(map(str, given))}", np.array(given, np.int32))
    options = schema.ReducerOptionsT()
    options.keepDims = keeps
    shape = [1 if axis in given else size for axis, size in enumerate(source.shape) if keeps or axis not in given]
    table = (OPTIONS.ReducerOptions, options)
    emit.write(node.outputs[0], shape, OPERATOR.MEAN, _MEAN, [source, stored], table)


def is_order(node: ir.Node) -> bool:
    """Tell whether a Transpose is written with what stands behind or before it."""
    return roles.has(node, Role.MAP_ORDER) or roles.has(node, Role.RAW_PIXELS)
