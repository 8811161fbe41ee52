"""Find GELU in its decomposed forms."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.passes.graph import Rewrites, add_node, constant, made_by, replace_uses, scalar

_POLYNOMIAL = {"Add": np.add, "Mul": np.multiply, "Pow": np.power, "Div": np.divide, "Sub": np.subtract}


def recover_gelu(model: ir.Model) -> Rewrites:
    """Replace `0.5 * x * (1 + Erf(x / sqrt(2)))` by one `Gelu`, whatever the order of its products.

    Before::

        x ─ Div(sqrt 2) ─ Erf ─ Add(1) ─ Mul(x) ─ Mul(0.5)

    After::

        x ─ Gelu

    The form with `Tanh(sqrt(2/pi) * (x + 0.044715 x³))` becomes `Gelu(approximate="tanh")`.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type not in ("Erf", "Tanh"):
            continue
        x = _unscaled(node.inputs[0]) if node.op_type == "Erf" else _argument(node.inputs[0])
        end = _end(node, x) if x is not None else None
        if x is None or end is None:
            form = "Erf(x / sqrt(2))" if node.op_type == "Erf" else "Tanh(sqrt(2/pi) * (x + 0.044715 x³))"
            near.append(f"{node.name}: an {node.op_type} that is no part of 0.5 * x * (1 + {form})")
            continue
        attributes = {} if node.op_type == "Erf" else {"approximate": "tanh"}
        replace_uses(end.outputs[0], add_node(end, "Gelu", [x], f"{end.name}/gelu", attributes))
        count += 1
    return Rewrites(count, tuple(near))


def _argument(value: ir.Value | None) -> ir.Value | None:
    """Find the x of which a value is sqrt(2/pi) * (x + 0.044715 x³): by what it is, not by how it is written."""
    points = np.linspace(-3.0, 3.0, 13)
    wanted = math.sqrt(2.0 / math.pi) * (points + 0.044715 * points**3)
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        each = waiting.pop(0)
        if each is None or each in seen or constant(each) is not None:
            continue
        seen.add(each)
        found = _polynomial(value, each, points)
        if found is not None and each is not value and np.allclose(found, wanted, rtol=1e-5):
            return each
        node = made_by(each, *_POLYNOMIAL)
        waiting += node.inputs if node is not None else []
    return None


def _polynomial(value: ir.Value | None, x: ir.Value, points: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Compute a value made of x by sums, products and powers, or give None."""
    if value is x:
        return points
    number = scalar(value)
    if number is not None:
        return np.full_like(points, number)
    node = made_by(value, *_POLYNOMIAL)
    operands = [_polynomial(item, x, points) for item in node.inputs] if node is not None else [None]
    if node is None or any(item is None for item in operands):
        return None
    result: NDArray[np.float64] = _POLYNOMIAL[node.op_type](*operands)
    return result


def _unscaled(value: ir.Value | None) -> ir.Value | None:
    step = made_by(value, "Div", "Mul")
    factor = scalar(step.inputs[1]) if step is not None else None
    if step is None or factor is None:
        return None
    expected = math.sqrt(2.0) if step.op_type == "Div" else 1.0 / math.sqrt(2.0)
    return step.inputs[0] if math.isclose(factor, expected, rel_tol=1e-5) else None


def _end(erf: ir.Node, x: ir.Value) -> ir.Node | None:
    """Follow Erf through Add(1) and the products with x and 0.5, in either order, to the last node."""
    add = _only_reader(erf.outputs[0], "Add")
    if add is None or 1.0 not in [scalar(value) for value in add.inputs]:
        return None
    wanted: list[str] = ["x", "half"]
    node, value = add, add.outputs[0]
    for _ in range(2):
        product = _only_reader(value, "Mul")
        if product is None:
            return None
        other = next((item for item in product.inputs if item is not value), None)
        half = made_by(other, "Mul")
        if other is x and "x" in wanted:
            wanted.remove("x")
        elif scalar(other) == 0.5 and "half" in wanted:
            wanted.remove("half")
        elif half is not None and any(item is x for item in half.inputs) and 0.5 in map(scalar, half.inputs):
            return product
        else:
            return None
        node, value = product, product.outputs[0]
    return node if constant(value) is None and not wanted else None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = tuple(value.uses())
    node = uses[0].node if len(uses) == 1 else None
    return node if node is not None and node.op_type == op_type else None
