"""Write MatMul, Add, Sub, Mul, Softmax, and the reductions of LayerNorm, with integer TFLite kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite import maps
from edgeq.backends.tflite.emitter import OPERATOR, OPTIONS, Emitter
from edgeq.backends.tflite.int32_sums import exact_sum, outer_product
from edgeq.backends.tflite.writer import DTYPES, QuantParams, Tensor
from edgeq.errors import LoweringFailed, UnsupportedRange
from edgeq.graph import roles
from edgeq.graph.edit import constant, is_read_once, made_by, readers
from edgeq.graph.roles import Role

_WEIGHT = 127  # magnitude of each int8 weight; a channel's factor is in its scale
_BIAS_STATED = 11  # the version of FULLY_CONNECTED from which its options name the dtype of the bias
_ADD_LIMIT = 2.0**14  # int16 ADD and SUB abort where an input's scale is so many times the output's


def sum_or_product(emit: Emitter, node: ir.Node) -> None:
    """Write Add, unless it adds the bias of a weight product: FULLY_CONNECTED adds that itself."""
    if _product_of(node) is None:
        elementwise(emit, node)


def _product_of(add: ir.Node) -> ir.Node | None:
    """Find the MatMul whose bias an Add adds."""
    product = next((made for value in add.inputs if (made := made_by(value, "MatMul")) is not None), None)
    return product if product is not None and is_read_once(product.outputs[0]) else None


def elementwise(emit: Emitter, node: ir.Node) -> None:
    """Write Add, Sub or Mul of two quantised tensors: in int32 where it is exact there, else as the operator."""
    if roles.has(node, Role.INT32_SUM):
        exact_sum(emit, node)
        return
    if roles.has(node, Role.ROW_FACTOR):
        outer_product(emit, node)
        return
    if not readers(node.outputs[0]) or any(made_by(value, "DequantizeLinear") is None for value in node.inputs):
        return  # part of the mask
    left, right = (emit.read(value) for value in node.inputs)
    shape = np.broadcast_shapes(left.shape, right.shape)
    row = _stored_row(emit, node) if emit.settings.rows == "depthwise" and node.op_type == "Mul" else None
    if row is not None and len(shape) == 3 and left.shape == shape:
        _depthwise(emit, node, left, row)
        return
    builtin, kind, options = {
        "Add": (OPERATOR.ADD, OPTIONS.AddOptions, schema.AddOptionsT),
        "Sub": (OPERATOR.SUB, OPTIONS.SubOptions, schema.SubOptionsT),
        "Mul": (OPERATOR.MUL, OPTIONS.MulOptions, schema.MulOptionsT),
    }[node.op_type]
    table = options()
    if node.op_type != "Mul":
        table.potScaleInt16 = False
    result = emit.write(node.outputs[0], shape, builtin, 2, [left, right], (kind, table))
    if node.op_type != "Mul" and result.dtype == "int16":
        largest = max(left.params.scales[0], right.params.scales[0])  # type: ignore[union-attr]
        if largest >= _ADD_LIMIT * result.params.scales[0]:  # type: ignore[union-attr]
            raise UnsupportedRange(f"{node.name}: its operand's scale {largest:g} is too large for its result's")


def _stored_row(emit: Emitter, node: ir.Node) -> NDArray[np.float64] | None:
    """Give the real values of a constant right operand with one value per channel, float64[channels], or None."""
    source = made_by(node.inputs[1], "DequantizeLinear")
    stored = constant(source.inputs[0]) if source is not None else None
    if source is None or stored is None or stored.size == 1 or stored.size != stored.shape[-1]:
        return None
    return stored.reshape(-1) * np.float64(emit.params(source).scales[0])


def _depthwise(emit: Emitter, node: ir.Node, left: Tensor, row: NDArray[np.float64]) -> None:
    """Multiply by a constant row as a 1x1 DEPTHWISE_CONV_2D: weights are +-127, scales hold the magnitudes."""
    quantizer = emit.quantizer(node.outputs[0])
    name = str(quantizer.outputs[0].name).removesuffix("/quantized")
    weights = (np.sign(row) * _WEIGHT).astype(np.int8).reshape(1, 1, 1, -1)
    scales = np.where(row == 0.0, 1.0, np.abs(row) / _WEIGHT).astype(np.float32)
    stored = emit.out.constant(f"{name}/row", weights, QuantParams(tuple(scales.tolist()), (0,) * len(row), 3))
    options = schema.DepthwiseConv2DOptionsT()
    options.padding, options.strideW, options.strideH, options.depthMultiplier = schema.Padding.VALID, 1, 1, 1
    flat = (1, *left.shape)
    source = emit.reshaped(left, flat, f"{name}/{node.inputs[0].name}/flat")  # type: ignore[union-attr]
    result = emit.out.tensor(f"{name}/flat", flat, "int16", emit.params(quantizer))
    table = (OPTIONS.DepthwiseConv2DOptions, options)
    emit.out.operator(OPERATOR.DEPTHWISE_CONV_2D, 5, [source, stored], result, table)
    emit.tensors[quantizer.outputs[0]] = emit.reshaped(result, left.shape, name)


def matmul(emit: Emitter, node: ir.Node) -> None:
    """Write MatMul: FULLY_CONNECTED with constant weights, BATCH_MATMUL of two computed tensors."""
    weight = made_by(node.inputs[1], "DequantizeLinear")
    stored = constant(weight.inputs[0]) if weight is not None else None
    if weight is not None and stored is not None:
        _fully_connected(emit, node, weight, stored)
        return
    left, right = (emit.read(value) for value in node.inputs)
    source = made_by(node.inputs[1], "DequantizeLinear")
    is_adjoint = source is not None and source.inputs[0] in emit.adjoint
    width = right.shape[-2] if is_adjoint else right.shape[-1]
    _batch_matmul(emit, node.outputs[0], left, right, (*left.shape[:-1], width), is_adjoint)


def _batch_matmul(
    emit: Emitter, value: ir.Value, left: Tensor, right: Tensor, shape: Sequence[int], is_adjoint: bool
) -> Tensor:
    options = schema.BatchMatMulOptionsT()
    options.adjY = is_adjoint
    version = 3 if left.dtype == "int16" else 2
    return emit.write(
        value, shape, OPERATOR.BATCH_MATMUL, version, [left, right], (OPTIONS.BatchMatMulOptions, options)
    )


def _fully_connected(emit: Emitter, node: ir.Node, weight: ir.Node, stored: NDArray[np.int8]) -> None:
    source = emit.read(node.inputs[0])
    params = emit.params(weight)
    name = str(weight.inputs[0].name)  # type: ignore[union-attr]
    # FULLY_CONNECTED takes weights as [out, in], with a scale for each output channel.
    matrix = emit.out.constant(name, np.ascontiguousarray(stored.T), replace(params, axis=0))
    inputs, end = [source, matrix], node
    add = readers(node.outputs[0])[0]
    if add.op_type == "Add" and is_read_once(node.outputs[0]):
        bias = next(made_by(value, "DequantizeLinear") for value in add.inputs if value is not node.outputs[0])
        values = constant(bias.inputs[0]) if bias is not None else None
        if bias is None or values is None:
            raise LoweringFailed(f"{node.name}: its bias is no constant")
        bits = emit.settings.bias_bits if source.dtype == "int16" else 32
        dtype = np.int64 if bits == 64 else np.int32
        inputs.append(emit.out.constant(str(bias.inputs[0].name), values.astype(dtype), emit.params(bias)))  # type: ignore[union-attr]
        end = add
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    version = 4 if source.dtype == "int16" else 5
    if source.dtype == "int16" and len(inputs) == 3 and emit.settings.is_bias_stated:
        version, options.quantizedBiasType = _BIAS_STATED, DTYPES[inputs[2].dtype]
    emit.write(
        end.outputs[0], (*source.shape[:-1], stored.shape[1]), OPERATOR.FULLY_CONNECTED, version, inputs,
        (OPTIONS.FullyConnectedOptions, options),
    )  # fmt: skip


def mean(emit: Emitter, node: ir.Node) -> None:
    """Write ReduceMean over channels as FULLY_CONNECTED with one column of ones: MEAN takes fifteen times as long."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is not None and axes.reshape(-1).tolist() in ([1], [1, 2]):
        maps.mean(emit, node)
        return
    width = emit.read(node.inputs[0]).shape[-1]
    _times_ones(emit, node, f"ones_{width}", 1.0 / width)


def total(emit: Emitter, node: ir.Node) -> None:
    """Write ReduceSum over the last axis as FULLY_CONNECTED with one column of ones; the mask is summed elsewhere."""
    if made_by(node.inputs[0], "DequantizeLinear") is not None:
        _times_ones(emit, node, f"ones_to_add_{emit.read(node.inputs[0]).shape[-1]}", 1.0)


def _times_ones(emit: Emitter, node: ir.Node, name: str, scale: float) -> None:
    source = emit.read(node.inputs[0])
    width = source.shape[-1]
    ones = emit.out.constant(name, np.ones((1, width), np.int8), QuantParams.of(float(np.float32(scale))))
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    table = (OPTIONS.FullyConnectedOptions, options)
    emit.write(node.outputs[0], (*source.shape[:-1], 1), OPERATOR.FULLY_CONNECTED, 4, [source, ones], table)


def squares(emit: Emitter, node: ir.Node) -> None:
    """Write ReduceSumSquare as BATCH_MATMUL of each row with itself: exact in the accumulator, rounded once."""
    source = emit.read(node.inputs[0])
    quantizer = emit.quantizer(node.outputs[0])
    name = str(quantizer.outputs[0].name).removesuffix("/quantized")
    rows = emit.reshaped(source, (*source.shape[:-1], 1, source.shape[-1]), f"{name}/rows")
    sums = emit.result(quantizer, (*source.shape[:-1], 1, 1))
    options = schema.BatchMatMulOptionsT()
    options.adjY = True
    emit.out.operator(OPERATOR.BATCH_MATMUL, 3, [rows, rows], sums, (OPTIONS.BatchMatMulOptions, options))
    emit.tensors[quantizer.outputs[0]] = emit.reshaped(sums, (*source.shape[:-1], 1), f"{name}/column")


def softmax(emit: Emitter, node: ir.Node) -> None:
    """Write Softmax over the last axis as SOFTMAX."""
    source = emit.read(node.inputs[0])
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    version = 3 if source.dtype == "int16" else 2
    emit.write(node.outputs[0], source.shape, OPERATOR.SOFTMAX, version, [source], (OPTIONS.SoftmaxOptions, options))
