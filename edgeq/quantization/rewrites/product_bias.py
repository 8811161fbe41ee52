"""Read and change the bias behind a weight product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import add_constant, constant, is_read_once, made_by, required
from edgeq.graph.linear import Linear, bias_of


def bias_add(product: ir.Node) -> ir.Node | None:
    """Give the Add of the bias that alone reads a product with a weight, or None."""
    linear = Linear.of(product)
    return linear.add if linear is not None else None


def biased_end(value: ir.Value | None) -> ir.Node | None:
    """Find the Add of a product's bias that makes a value, looking through the sum with another branch."""
    add = made_by(value, "Add")
    if add is None or not is_read_once(add.outputs[0]):
        return None
    found = bias_of(add)
    if found is not None:
        return add if made_by(add.inputs[1 - found[0]], "MatMul") is not None else None
    return next((end for operand in add.inputs if (end := biased_end(operand)) is not None), None)


def shift_input(graph: ir.Graph, product: ir.Node, shift: NDArray[np.floating]) -> bool:
    """Add `shift @ W` to the bias behind a product whose input loses `shift`: its output stays what it was."""
    add, weight = bias_add(product), constant(product.inputs[1])
    if add is None or weight is None:
        return False
    add_to_bias(graph, add, (shift.astype(np.float64) @ weight.astype(np.float64)))
    return True


def add_to_bias(graph: ir.Graph, add: ir.Node, shift: NDArray[np.float64]) -> None:
    """Add float64[out] to the constant of an Add."""
    position, bias = required(bias_of(add))
    put_constant(graph, add, position, bias + shift)


def put_constant(graph: ir.Graph, node: ir.Node, position: int, array: NDArray[np.floating]) -> None:
    """Let a node read a new constant, which is named after the one that it read."""
    name = str(required(node.inputs[position]).name)
    node.replace_input_with(position, add_constant(graph, name, array.astype(np.float32)))
