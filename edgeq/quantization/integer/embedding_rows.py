"""Quantise the table of a Gather to int8 with a scale for each row, where no int32 sum reads it: static embeddings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph.edit import add_constant, add_node, constant, readers
from edgeq.quantization import weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import QdqBuilder, QuantizedValue, symmetric

_IDENTITY = Affine(1.0, 0, -128, 127)  # of integers that stand for themselves


def is_pooled(tokens: ir.Value) -> bool:
    """Tell whether only a pooling reads looked up tokens: a MatMul, or an elementwise Mul, by the pooling weights."""
    return all(
        (use.node.op_type, use.idx) == ("MatMul", 1)
        or (use.node.op_type == "Mul" and all(constant(value) is None for value in use.node.inputs))
        for use in tokens.uses()
    )


def scaled_rows(builder: QdqBuilder, node: ir.Node, bits: int) -> None:
    """Let a Gather give int8 values and an int16 scale for each row, multiplied in 16 bits.

    Before::

        Gather(table, input_ids)

    After::

        Gather(int8 table, input_ids) ─┬─ Mul
        Gather(row scales, input_ids) ─┘

    The rows of a static table differ in length by their tokens' weights: with one scale, short rows would be left few
    of the 255 values.

    Args:
        builder: of the graph.
        node: a Gather of a float table; its readers read the product then.
        bits: of the table.
    """
    table, output = constant(node.inputs[0]), node.outputs[0]
    if table is None or node.inputs[0] is None or node.inputs[1] is None:
        raise Unsupported(f"{node.name}: looks up in no table")
    following = readers(output)
    name, stem, before = str(node.inputs[0].name), str(output.name), following[0]
    values, scales = weight_rounding.nearest(table.T, bits)
    steps = symmetric(float(scales.max()), 16)
    factors = np.rint(scales.astype(np.float64) / steps.scale).astype(np.int16)[:, None]
    node.replace_input_with(0, add_constant(builder.graph, f"{name}/codes", np.ascontiguousarray(values.T)))
    node.name = output.name = f"{stem}/codes"
    output.dtype = ir.DataType.INT8
    stored = add_constant(builder.graph, f"{name}/factors", factors)
    found = add_node(before, "Gather", [stored, node.inputs[1]], f"{stem}/factors")
    found.dtype = ir.DataType.INT16
    if output.shape is not None:
        found.shape = ir.Shape([*list(output.shape)[:-1], 1])
    operands = []
    for looked_up, params, own_bits in ((output, _IDENTITY, 8), (found, steps, 16)):
        parameters = builder.parameters(str(looked_up.name), params, own_bits)
        real = add_node(before, "DequantizeLinear", [looked_up, *parameters], f"{looked_up.name}/dequantized")
        builder.quantized[looked_up] = QuantizedValue(real, params, own_bits)
        operands.append(builder.read(looked_up, 16, before).value)
    product = add_node(before, "Mul", operands, stem)
    product.shape, product.dtype = output.shape, ir.DataType.FLOAT
    for reader in following:
        for position, value in enumerate(reader.inputs):
            if value is output:
                reader.replace_input_with(position, product)
    maker = product.producer()
    if maker is not None:
        builder.store(maker, product, symmetric(float(np.abs(table).max()), 16), 16)
