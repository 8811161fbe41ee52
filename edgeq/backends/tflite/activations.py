"""Write GELU, ReLU, Clip, Sigmoid, Tanh and 1/sqrt: as a TFLite operator, or as an int16 lookup table."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite.emitter import INT16_VALUES, OPERATOR, OPTIONS, Emitter
from edgeq.graph.edit import made_by, readers

_UNIT_SCALE = 1.0 / 2**15  # the output scale of TFLite's int16 TANH and LOGISTIC


def gelu(emit: Emitter, node: ir.Node) -> None:
    """Write Gelu as GELU, or as an int16 table where the target's `lookup` is "all"."""
    source = emit.read(node.inputs[0])
    if source.dtype == "int16" and emit.settings.lookup == "all":
        entries = _gelu_of(INT16_VALUES.astype(np.float64) * emit.step(source)) / emit.result_step(node.outputs[0])
        emit.looked_up(node.outputs[0], source, entries)
        return
    options = schema.GeluOptionsT()
    kind = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
    options.approximate = kind == "tanh"
    emit.write(node.outputs[0], source.shape, OPERATOR.GELU, 2, [source], (OPTIONS.GeluOptions, options))


def relu(emit: Emitter, node: ir.Node) -> None:
    """Write Relu as RELU."""
    source = emit.read(node.inputs[0])
    emit.write(node.outputs[0], source.shape, OPERATOR.RELU, 2, [source])


def clip(emit: Emitter, node: ir.Node) -> None:
    """Write Clip as QUANTIZE to parameters whose range ends at the limits; a Clip of the mask is written elsewhere."""
    if made_by(node.inputs[0], "DequantizeLinear") is None:
        return
    source = emit.read(node.inputs[0])
    emit.requantized(source, emit.result(emit.quantizer(node.outputs[0]), source.shape))


def sigmoid(emit: Emitter, node: ir.Node) -> None:
    """Write Sigmoid as int16 LOGISTIC."""
    source = emit.read(node.inputs[0])
    emit.write(node.outputs[0], source.shape, OPERATOR.LOGISTIC, 3, [source])


def tanh(emit: Emitter, node: ir.Node) -> None:
    """Write int16 Tanh as a table, or as TANH where the target's `lookup` is "none"."""
    source = emit.read(node.inputs[0])
    if emit.settings.lookup == "none" and emit.result_step(node.outputs[0]) == _UNIT_SCALE:
        emit.write(node.outputs[0], source.shape, OPERATOR.TANH, 3, [source])
        return
    reals = INT16_VALUES.astype(np.float64) * emit.step(source)
    emit.looked_up(node.outputs[0], source, np.tanh(reals) / emit.result_step(node.outputs[0]))


def inverse_root(emit: Emitter, node: ir.Node) -> None:
    """Write Sqrt and the Reciprocal behind it as one int16 RSQRT, or as a table."""
    if made_by(node.inputs[0], "DequantizeLinear") is None:
        return  # part of the mask
    source = emit.read(node.inputs[0])
    inverse = readers(node.outputs[0])[0]
    if emit.settings.lookup == "none":
        emit.write(inverse.outputs[0], source.shape, OPERATOR.RSQRT, 1, [source])
        return
    # RSQRT interpolates a table of every 128th value, which is inexact for small values.
    factor = 1.0 / (math.sqrt(emit.step(source)) * emit.result_step(inverse.outputs[0]))
    exact = 2.0 ** round(math.log2(factor / INT16_VALUES[-1])) * float(INT16_VALUES[-1])
    if math.isclose(factor, exact, rel_tol=1e-6):  # scales are rounded to float32
        factor = exact
    # A sum of squares is never negative; a stored 0 stands for at most half a step.
    values = np.maximum(INT16_VALUES[len(INT16_VALUES) // 2 :], 0.5)
    emit.looked_up(inverse.outputs[0], source, factor / np.sqrt(values))


def _gelu_of(reals: NDArray[np.float64]) -> NDArray[np.float64]:
    twice = np.array([1.0 + math.erf(real / math.sqrt(2.0)) for real in reals.tolist()], np.float64)
    product: NDArray[np.float64] = reals * twice / 2.0
    return product
