"""Give products of two 16-bit tensors their right operand in int16: in uint16 the compiler reads 8 bits of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import add_constant, add_node, constant, made_by
from edgeq.quantization.qdq import symmetric

OLDEST = 73  # the HTP version from which MatMul takes it; v68's compiler refuses it (validateOpConfig, 3110)


def int16_right_operands(graph: ir.Graph) -> None:
    """Quantise the uint16 right operand of each MatMul of two computed tensors once more, to int16 without zero point.

    Before::

        DequantizeLinear(uint16) ─ MatMul

    After::

        DequantizeLinear(uint16) ─ QuantizeLinear(int16) ─ DequantizeLinear ─ MatMul
    """
    for node in list(graph):
        right = node.inputs[1] if node.op_type == "MatMul" else None
        source = made_by(right, "DequantizeLinear")
        if right is None or source is None or constant(source.inputs[0]) is not None:
            continue
        scale, zero_point = (constant(value) for value in source.inputs[1:])
        if scale is None or zero_point is None or zero_point.dtype != np.uint16:
            continue
        largest = max(int(zero_point), 65535 - int(zero_point)) * float(scale)
        stem = f"{node.name}/right"
        parameters = [
            add_constant(graph, f"{stem}/scale", np.array(symmetric(largest, 16).scale, np.float32)),
            add_constant(graph, f"{stem}/zero_point", np.array(0, np.int16)),
        ]
        quantized = add_node(node, "QuantizeLinear", [right, *parameters], f"{stem}/quantized")
        node.replace_input_with(1, add_node(node, "DequantizeLinear", [quantized, *parameters], f"{stem}/dequantized"))
