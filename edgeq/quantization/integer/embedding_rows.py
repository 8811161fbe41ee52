"""Look rows of a table up with a scale of their own, where no exact sum reads them: static embeddings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph.edit import add_constant, add_node, constant, readers
from edgeq.quantization import weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import Coded, CodedGraph, symmetric

_WHOLE = Affine(1.0, 0, -128, 127)  # codes that stand for themselves


def is_pooled(tokens: ir.Value) -> bool:
    """Tell whether only a pooling reads looked up tokens: a product by their shares, of matrices or each by its own."""
    return all(
        (use.node.op_type, use.idx) == ("MatMul", 1)
        or (use.node.op_type == "Mul" and all(constant(value) is None for value in use.node.inputs))
        for use in tokens.uses()
    )


def scaled_rows(codes: CodedGraph, node: ir.Node, bits: int) -> None:
    """Let a lookup give 8-bit codes and a 16-bit number for each row, multiplied in 16 bits.

    Before::

        Gather(table, input_ids)

    After::

        Gather(codes, input_ids) ──────┬─ Mul
        Gather(row scales, input_ids) ─┘

    The rows of a static table differ in length by their tokens' weights: one scale would leave short ones few codes.

    Args:
        codes: of the graph.
        node: a Gather of a float table; its readers read the product then.
        bits: of the table's codes.
    """
    table, output = constant(node.inputs[0]), node.outputs[0]
    if table is None or node.inputs[0] is None or node.inputs[1] is None:
        raise Unsupported(f"{node.name}: looks up in no table")
    following = readers(output)
    name, stem, before = str(node.inputs[0].name), str(output.name), following[0]
    array, scales = weight_rounding.nearest(table.T, bits)
    steps = symmetric(float(scales.max()), 16)
    factors = np.rint(scales.astype(np.float64) / steps.scale).astype(np.int16)[:, None]
    node.replace_input_with(0, add_constant(codes.graph, f"{name}/codes", np.ascontiguousarray(array.T)))
    node.name = output.name = f"{stem}/codes"
    output.dtype = ir.DataType.INT8
    stored = add_constant(codes.graph, f"{name}/factors", factors)
    found = add_node(before, "Gather", [stored, node.inputs[1]], f"{stem}/factors")
    found.dtype = ir.DataType.INT16
    if output.shape is not None:
        found.shape = ir.Shape([*list(output.shape)[:-1], 1])
    operands = []
    for looked_up, affine, width in ((output, _WHOLE, 8), (found, steps, 16)):
        parameters = codes.parameters(str(looked_up.name), affine, width)
        real = add_node(before, "DequantizeLinear", [looked_up, *parameters], f"{looked_up.name}/dequantized")
        codes.coded[looked_up] = Coded(real, affine, width)
        operands.append(codes.read(looked_up, 16, before).value)
    product = add_node(before, "Mul", operands, stem)
    product.shape, product.dtype = output.shape, ir.DataType.FLOAT
    for reader in following:
        for position, value in enumerate(reader.inputs):
            if value is output:
                reader.replace_input_with(position, product)
    maker = product.producer()
    if maker is not None:
        codes.store(maker, product, symmetric(float(np.abs(table).max()), 16), 16)
