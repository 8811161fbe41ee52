"""Write what turns codes into other codes, and the attention mask into codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.backends.tflite import pooling
from edgeq.backends.tflite.emitter import Emitter
from edgeq.backends.tflite.sums import raw
from edgeq.backends.tflite.writer import Codes
from edgeq.errors import LoweringFailed
from edgeq.passes.graph import made_by


def quantize(emit: Emitter, node: ir.Node) -> None:
    """Write what turns codes into other codes; what stands behind an operator was written with it."""
    source = made_by(node.inputs[0], "DequantizeLinear")
    if source is not None:
        _requantize(emit, node)
    elif node.outputs[0] not in emit.tensors:
        _mask_codes(emit, node)


def _requantize(emit: Emitter, node: ir.Node) -> None:
    source = emit.read(node.inputs[0])
    result = emit.result(node, source.shape)
    is_cast = (source.dtype, result.dtype) == ("int8", "int16") and source.codes == result.codes
    if is_cast and emit.settings.upcast == "cast":
        emit.cast(source, result)
    else:
        emit.requantized(source, result)


def _mask_codes(emit: Emitter, node: ir.Node) -> None:
    """Write the attention mask, or each token's share of the mean, in codes."""
    value = node.inputs[0]
    maker = value.producer() if value is not None else None
    if maker is None or emit.mask is None:
        raise LoweringFailed(f"{node.name}: quantises an input")
    if pooling.is_share(node):
        pooling.shares(emit, node)
        return
    if pooling.is_cap(node):
        pooling.cap(emit, node)
        return
    if maker.op_type != "Mul":
        raise LoweringFailed(f"{node.name}: {maker.op_type} is no form of the attention mask")
    codes = emit.codes(node)
    name = str(node.outputs[0].name).removesuffix("/quantized")
    if codes.zero_points[0] > 0:  # code 0 is -size, and the zero point is 0
        flat = emit.out.tensor(f"{name}/flat", (1, emit.length), "int8", codes)
        one = emit.out.constant(f"int32_{codes.zero_points[0]}", np.array([codes.zero_points[0]], np.int32))
        emit.cast(raw(emit, "MUL", emit.mask, one), flat)
        emit.tensors[node.outputs[0]] = emit.reshaped(flat, (1, 1, 1, emit.length), name)
        return
    size = codes.scales[0] * 32767.0
    flat = emit.out.tensor(f"{name}/flat", (1, emit.length), "int16", Codes.of(float(np.float32(size))))
    emit.cast(emit.mask, flat)
    shaped = emit.reshaped(flat, (1, 1, 1, emit.length), f"{name}/shaped")
    result = emit.result(node, (1, 1, 1, emit.length))
    emit.requantized(shaped, result)
