"""Give MatMul right operands that a version of HTP takes and reads whole: of uint16 it reads 8 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import add_constant, add_node, constant, made_by
from edgeq.quantization import affine
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import symmetric

_READS_INT16 = 73  # the first HTP version whose MatMul takes an int16 right operand; v68's compiler refuses it (3110)


def fit_right_operands(graph: ir.Graph, htp_arch: int) -> None:
    """Quantise the uint16 right operand of each MatMul to int16 without zero point; for v68, constants alone, to uint8.

    Before::

        DequantizeLinear(uint16) ─ MatMul

    After, a constant's integers instead of the pair::

        DequantizeLinear(uint16) ─ QuantizeLinear(int16) ─ DequantizeLinear ─ MatMul

    v68 reads 8 bits of a computed operand in uint16, and refuses a constant one.

    Args:
        graph: of a QDQ model for one length; edited in place.
        htp_arch: the version of HTP.
    """
    for node in list(graph):
        right = node.inputs[1] if node.op_type == "MatMul" else None
        source = made_by(right, "DequantizeLinear")
        if right is None or source is None:
            continue
        scale, zero_point = (constant(value) for value in source.inputs[1:])
        if scale is None or zero_point is None or zero_point.dtype != np.uint16:
            continue
        codes, held = constant(source.inputs[0]), Affine(float(scale), int(zero_point), 0, 65535)
        if htp_arch >= _READS_INT16:
            largest = max(held.zero_point, held.high - held.zero_point) * held.scale
            _store(graph, node, right, symmetric(largest, 16), np.int16, codes, held)
        elif codes is not None:
            real = affine.dequantize(codes, held)
            _store(graph, node, right, affine.asymmetric(float(real.min()), float(real.max())), np.uint8, codes, held)


def _store(
    graph: ir.Graph, node: ir.Node, right: ir.Value, params: Affine, dtype: type[np.integer],
    codes: NDArray[np.generic] | None, held: Affine,
) -> None:  # fmt: skip
    """Let a MatMul read its right operand with other parameters: quantised once more, or stored where constant."""
    stem = f"{node.name}/right"
    parameters = [
        add_constant(graph, f"{stem}/scale", np.array(params.scale, np.float32)),
        add_constant(graph, f"{stem}/zero_point", np.array(params.zero_point, dtype)),
    ]
    if codes is None:
        quantized = add_node(node, "QuantizeLinear", [right, *parameters], f"{stem}/quantized")
    else:
        array = affine.quantize(affine.dequantize(codes, held), params).astype(dtype)
        quantized = add_constant(graph, f"{stem}/codes", array)
    node.replace_input_with(1, add_node(node, "DequantizeLinear", [quantized, *parameters], f"{stem}/dequantized"))
