"""Write QuantizeLinear: requantise a tensor to other parameters, or quantise what follows from the attention mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite import maps, pooling
from edgeq.backends.tflite.emitter import OPERATOR, OPTIONS, Emitter
from edgeq.backends.tflite.int32_sums import raw
from edgeq.backends.tflite.writer import QuantParams, Tensor
from edgeq.errors import LoweringFailed
from edgeq.graph import roles
from edgeq.graph.attention_mask import allowed_pattern
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import constant, made_by, required
from edgeq.graph.evaluate import computed
from edgeq.graph.roles import Role

_EXACT_STEP, _INT16_RANGE = 128, 2**15


def quantize(emit: Emitter, node: ir.Node) -> None:
    """Write a QuantizeLinear of a quantised tensor or of the mask; one behind an operator was written with it."""
    source = made_by(node.inputs[0], "DequantizeLinear")
    if source is not None:
        _requantize(emit, node)
    elif roles.has(node.inputs[0].producer() if node.inputs[0] is not None else None, Role.RAW_PIXELS):
        maps.pixels(emit, node)
    elif node.outputs[0] not in emit.tensors:
        _quantize_mask(emit, node)


def _requantize(emit: Emitter, node: ir.Node) -> None:
    source = emit.read(node.inputs[0])
    result = emit.result(node, source.shape)
    is_cast = (source.dtype, result.dtype) == ("int8", "int16") and source.params == result.params
    if is_cast and emit.settings.upcast == "cast":
        emit.cast(source, result)
    else:
        emit.requantized(source, result)


def _quantize_mask(emit: Emitter, node: ir.Node) -> None:
    """Write the quantised attention bias, pooling weights, padding cap or positions that follow from the mask."""
    value = node.inputs[0]
    maker = value.producer() if value is not None else None
    if maker is None:
        raise LoweringFailed(f"{node.name}: quantises an input")
    if roles.has(node, Role.POOLING_WEIGHTS):
        shape = (1, emit.length, 1) if maker.op_type == "Transpose" else (1, 1, emit.length)
        power = pooling.share_power(value, emit.length) if emit.settings.lookup == "none" else None
        if power is not None:
            _rooted_shares(emit, node, shape, power)
        else:
            pooling.shares(emit, node, shape)
        return
    if roles.has(node, Role.PADDING_CAP):
        pooling.cap(emit, node)
        return
    if follows_from_sizes(value):
        _positions(emit, node)
        return
    if maker.op_type != "Mul":
        raise LoweringFailed(f"{node.name}: {maker.op_type} is no form of the attention mask")
    params = emit.params(node)
    name = str(node.outputs[0].name).removesuffix("/quantized")
    if params.zero_points[0] <= 0:
        raise LoweringFailed(f"{node.name}: an attention mask without a zero point")
    allowed = allowed_pattern(required(value))
    if allowed is not None:
        _limited(emit, node, params, pooling.of_inputs(allowed, np.ones((1, emit.length), np.int64)))
        return
    if emit.settings.upcast == "quantize":
        _bias(emit, node, params)
        return
    # The value 0 means -size, and the zero point means 0.
    flat = emit.out.tensor(f"{name}/flat", (1, emit.length), "int8", params)
    one = emit.out.constant(f"int32_{params.zero_points[0]}", np.array([params.zero_points[0]], np.int32))
    emit.cast(raw(emit, "MUL", emit.token_mask(), one), flat)
    emit.tensors[node.outputs[0]] = emit.reshaped(flat, (1, 1, 1, emit.length), name)


def kept(emit: Emitter, mask: ir.Value) -> Tensor:
    """Give int32 1 where a query may look; 0 for padding and where a causal or local pattern shuts it out."""
    maker = mask.producer()
    if maker is None or maker.op_type != "Mul":
        raise LoweringFailed(f"{mask.name}: is no attention mask of the form (mask - 1) * size")
    allowed = allowed_pattern(mask)
    if allowed is None:
        return emit.token_mask()
    pattern = pooling.of_inputs(allowed, np.ones((1, emit.length), np.int64))
    stored = emit.out.constant(f"{mask.name}/allowed", np.rint(pattern).astype(np.int32))
    return raw(emit, "MUL", emit.token_mask(), stored)


def _positions(emit: Emitter, node: ir.Node) -> None:
    """Store a quantised tensor that follows from sizes alone as a constant, computed for this signature's length."""
    params = emit.params(node)
    zero_point = constant(node.inputs[2])
    if zero_point is None or node.inputs[0] is None:
        raise LoweringFailed(f"{node.name}: has no zero point, so no dtype")
    limits = np.iinfo(zero_point.dtype)
    ones = {name: np.ones(shape, np.int64) for name, shape in emit.sizes.items()}
    values = computed(node.inputs[0], ones).astype(np.float32)
    stored = np.rint(values.astype(np.float64) / params.scales[0]) + params.zero_points[0]
    name = str(node.outputs[0].name).removesuffix("/quantized")
    array = np.clip(stored, limits.min, limits.max).astype(zero_point.dtype)
    emit.tensors[node.outputs[0]] = emit.out.constant(name, array, params)


def _limited(emit: Emitter, node: ir.Node, params: QuantParams, allowed: NDArray[np.float32]) -> None:
    """Multiply the mask by a constant causal or local pattern: [1, 1, sequence, sequence], quantised."""
    name = str(node.outputs[0].name).removesuffix("/quantized")
    stored = emit.out.constant(f"{name}/allowed", np.rint(allowed * params.zero_points[0]).astype(np.int32))
    product = raw(emit, "MUL", emit.token_mask(), stored)
    result = emit.out.tensor(name, product.shape, "int8", params)
    emit.cast(product, result)
    emit.tensors[node.outputs[0]] = result


def _bias(emit: Emitter, node: ir.Node, params: QuantParams) -> None:
    """Write (mask - 1) * size as int8 SUB and MUL; the mask is cast to int8 once for all readers."""
    name = str(node.outputs[0].name).removesuffix("/quantized")
    one = emit.out.constant("attention_mask/one", np.array([1], np.int8), QuantParams.of(1.0))
    size = emit.out.constant(
        "attention_mask/size", np.array([1], np.int8), QuantParams.of(params.scales[0] * params.zero_points[0])
    )
    shifted = emit.out.tensor("attention_mask/shifted", (1, emit.length), "int8", QuantParams.of(1.0))
    table = schema.SubOptionsT()
    table.potScaleInt16 = False
    emit.out.operator(OPERATOR.SUB, 2, [_narrow_mask(emit), one], shifted, (OPTIONS.SubOptions, table))
    flat = emit.out.tensor(f"{name}/flat", (1, emit.length), "int8", params)
    emit.out.operator(OPERATOR.MUL, 2, [shifted, size], flat, (OPTIONS.MulOptions, schema.MulOptionsT()))
    emit.tensors[node.outputs[0]] = emit.reshaped(flat, (1, 1, 1, emit.length), name)


def _narrow_mask(emit: Emitter) -> Tensor:
    """Give the mask as int8, cast once."""
    if emit.narrow_mask is None:
        emit.narrow_mask = emit.out.tensor("attention_mask/narrow", (1, emit.length), "int8", QuantParams.of(1.0))
        emit.cast(emit.token_mask(), emit.narrow_mask)
    return emit.narrow_mask


def _wide_mask(emit: Emitter, name: str) -> Tensor:
    """Give the mask as int16."""
    ones = emit.out.tensor(f"{name}/mask", (1, emit.length), "int16", QuantParams.of(1.0))
    if emit.settings.upcast == "quantize":
        emit.requantized(_narrow_mask(emit), ones)
    else:
        emit.cast(emit.token_mask(), ones)
    return ones


def _rooted_shares(emit: Emitter, node: ir.Node, shape: tuple[int, ...], power: float) -> None:
    """Write pooling weights 1/n or 1/sqrt(n) for n tokens by RSQRT, without a lookup table."""
    params = emit.params(node)
    name = str(node.outputs[0].name).removesuffix("/quantized")
    ones = _wide_mask(emit, name)
    inverse = _inverse_root(emit, ones, name, params)
    if power == 1.0:
        root, inverse = inverse, emit.out.tensor(f"{name}/inverse", (1, 1), "int16", params)
        emit.out.operator(OPERATOR.MUL, 2, [root, root], inverse, (OPTIONS.MulOptions, schema.MulOptionsT()))
    flat = emit.out.tensor(f"{name}/flat", (1, emit.length), "int16", params)
    emit.out.operator(OPERATOR.MUL, 2, [ones, inverse], flat, (OPTIONS.MulOptions, schema.MulOptionsT()))
    emit.tensors[node.outputs[0]] = emit.reshaped(flat, shape, name)


def _inverse_root(emit: Emitter, mask: Tensor, name: str, params: QuantParams) -> Tensor:
    """Write 1/sqrt(n) for n tokens: the count is scaled so that RSQRT reads every 128th value, where it is exact."""
    step = 1.0 / _EXACT_STEP if emit.length <= _INT16_RANGE // _EXACT_STEP else emit.length / _INT16_RANGE
    column = emit.out.constant(f"ones_to_add_{emit.length}", np.ones((1, emit.length), np.int8), QuantParams.of(1.0))
    count = emit.out.tensor(f"{name}/count", (1, 1), "int16", QuantParams.of(float(np.float32(step))))
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    table = (OPTIONS.FullyConnectedOptions, options)
    emit.out.operator(OPERATOR.FULLY_CONNECTED, 4, [mask, column], count, table)
    root = emit.out.tensor(f"{name}/root", (1, 1), "int16", params)
    return emit.out.operator(OPERATOR.RSQRT, 1, [count], root)
