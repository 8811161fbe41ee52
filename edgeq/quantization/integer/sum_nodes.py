"""Recognise the Add, Mul, Sub and Gather nodes of which int32 sums are made."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.edit import constant, is_read_once, made_by, readers, required
from edgeq.graph.roles import Role
from edgeq.quantization.qdq import QdqBuilder


def is_table(node: ir.Node) -> bool:
    """Tell whether a node reads a float table of rows."""
    table = constant(node.inputs[0])
    return table is not None and table.dtype == np.float32 and table.ndim == 2


def is_factor(node: ir.Node) -> bool:
    """Tell whether a Mul makes the factors of rows: gain times one over a row's length."""
    return roles.has(node, Role.ROW_FACTOR)


def is_product_of_rows(node: ir.Node) -> bool:
    """Tell whether a Mul multiplies rows by their factors."""
    factor = made_by(node.inputs[1], "Mul")
    return node.op_type == "Mul" and factor is not None and is_factor(factor)


def largest_gain(product: ir.Node) -> float:
    """Give the largest gain among a product's factors."""
    gain = constant(required(made_by(product.inputs[1], "Mul")).inputs[1])
    return max(float(np.abs(gain).max()), 1e-12)  # type: ignore[arg-type]


def is_sum(node: ir.Node) -> bool:
    """Tell whether an Add adds two computed tensors."""
    return node.op_type == "Add" and all(constant(value) is None for value in node.inputs)


def is_term(node: ir.Node, builder: QdqBuilder) -> bool:
    """Tell whether a node is a quantised tensor times a constant, which a sum alone reads."""
    output, source = node.outputs[0], node.inputs[0]
    is_scaled = constant(node.inputs[1]) is not None and source in builder.quantized
    if not is_scaled or source is None or not is_read_once(output) or not is_sum(readers(output)[0]):
        return False
    return builder.quantized[source].params.zero_point == 0


def subtracts(node: ir.Node, value: ir.Value, mean: ir.Value) -> bool:
    """Tell whether a Sub takes a mean from the value that it is of."""
    return node.op_type == "Sub" and node.inputs[0] is value and node.inputs[1] is mean
