"""Write functions of one tensor: as an operator, or as a table of its codes."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite.emitter import INT16_CODES, OPERATOR, OPTIONS, Emitter
from edgeq.graph.edit import made_by, readers

_STEP_OF_ONE = 1.0 / 2**15  # of what the 16-bit operators of tanh and sigmoid give


def gelu(emit: Emitter, node: ir.Node) -> None:
    """Write GELU: the operator, or a table where the runtime has no 16-bit one."""
    source = emit.read(node.inputs[0])
    if source.dtype == "int16" and emit.settings.lookup == "all":
        entries = _gelu_of(INT16_CODES.astype(np.float64) * emit.step(source)) / emit.result_step(node.outputs[0])
        emit.looked_up(node.outputs[0], source, entries)
        return
    options = schema.GeluOptionsT()
    kind = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
    options.approximate = kind == "tanh"
    emit.write(node.outputs[0], source.shape, OPERATOR.GELU, 2, [source], (OPTIONS.GeluOptions, options))


def relu(emit: Emitter, node: ir.Node) -> None:
    """Write ReLU."""
    source = emit.read(node.inputs[0])
    emit.write(node.outputs[0], source.shape, OPERATOR.RELU, 2, [source])


def clip(emit: Emitter, node: ir.Node) -> None:
    """Write what keeps values within limits: codes that saturate there; that of the mask is written elsewhere."""
    if made_by(node.inputs[0], "DequantizeLinear") is None:
        return
    source = emit.read(node.inputs[0])
    emit.requantized(source, emit.result(emit.quantizer(node.outputs[0]), source.shape))


def sigmoid(emit: Emitter, node: ir.Node) -> None:
    """Write the logistic function of 16 bits."""
    source = emit.read(node.inputs[0])
    emit.write(node.outputs[0], source.shape, OPERATOR.LOGISTIC, 3, [source])


def tanh(emit: Emitter, node: ir.Node) -> None:
    """Write tanh of 16 bits: as a table, or the operator where there are none."""
    source = emit.read(node.inputs[0])
    if emit.settings.lookup == "none" and emit.result_step(node.outputs[0]) == _STEP_OF_ONE:
        emit.write(node.outputs[0], source.shape, OPERATOR.TANH, 3, [source])
        return
    reals = INT16_CODES.astype(np.float64) * emit.step(source)
    emit.looked_up(node.outputs[0], source, np.tanh(reals) / emit.result_step(node.outputs[0]))


def inverse_root(emit: Emitter, node: ir.Node) -> None:
    """Write one over the square root, which Sqrt and Reciprocal are together."""
    if made_by(node.inputs[0], "DequantizeLinear") is None:
        return  # of the mask
    source = emit.read(node.inputs[0])
    inverse = readers(node.outputs[0])[0]
    if emit.settings.lookup == "none":
        emit.write(inverse.outputs[0], source.shape, OPERATOR.RSQRT, 1, [source])
        return
    # The operator interpolates a table of every 128th code: it is off where codes are small.
    factor = 1.0 / (math.sqrt(emit.step(source)) * emit.result_step(inverse.outputs[0]))
    exact = 2.0 ** round(math.log2(factor / INT16_CODES[-1])) * float(INT16_CODES[-1])
    if math.isclose(factor, exact, rel_tol=1e-6):  # but for the rounding of scales to float32
        factor = exact
    codes = np.maximum(
        INT16_CODES[len(INT16_CODES) // 2 :], 0.5
    )  # no sum of squares is negative; 0 is half a step at most
    emit.looked_up(inverse.outputs[0], source, factor / np.sqrt(codes))


def _gelu_of(reals: NDArray[np.float64]) -> NDArray[np.float64]:
    twice = np.array([1.0 + math.erf(real / math.sqrt(2.0)) for real in reals.tolist()], np.float64)
    product: NDArray[np.float64] = reals * twice / 2.0
    return product
