"""Find GELU in its decomposed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import Rewrites, add_node, made_by, readers, replace_uses, scalar

_GRID = np.linspace(-6.0, 6.0, 241)
_NEAR = 1e-6  # constants in files are written in FP32
_STEPS = 8  # elementwise nodes between x and the end, on one path
_QUICK = 1.702

Grid = NDArray[np.float64]


def recover_gelu(model: ir.Model) -> Rewrites:
    """Replace what computes GELU of one value by one `Gelu`, in whatever order it multiplies and adds.

    Before::

        x ─ Div(sqrt 2) ─ Erf ─ Add(1) ─ Mul(x) ─ Mul(0.5)
        x ─ Pow(3) ─ Mul(0.044715) ─ Add(x) ─ Mul(sqrt(2/pi)) ─ Tanh ─ Add(1) ─ Mul(x) ─ Mul(0.5)

    After::

        x ─ Gelu
        x ─ Gelu(approximate tanh)

    Whether it is GELU is decided by computing it on a grid. x * sigmoid(1.702 x) is another function and stays.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type == "Sigmoid" and _is_quick(node):
            near.append(f"{node.name}: x * sigmoid({_QUICK} x) only resembles GELU; it stays as it is")
        if node.op_type not in ("Erf", "Tanh"):
            continue
        kind = "none" if node.op_type == "Erf" else "tanh"
        found = _found(node, _gelu(kind))
        if found is None:
            if node.op_type == "Erf" or _is_scaled(node):
                near.append(f"{node.name}: an {node.op_type} that is no part of GELU of one value")
            continue
        x, end = found
        attributes = {"approximate": "tanh"} if kind == "tanh" else None
        replace_uses(end.outputs[0], add_node(end, "Gelu", [x], f"{end.name}/gelu", attributes))
        count += 1
    return Rewrites(count, tuple(near))


def _gelu(kind: str) -> Grid:
    x = _GRID
    inner = np.array([math.erf(v / math.sqrt(2)) for v in x])
    if kind == "tanh":
        inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return np.asarray(0.5 * x * (1.0 + inner))


def _found(node: ir.Node, expected: Grid) -> tuple[ir.Value, ir.Node] | None:
    """Give x and the last node, where a node behind `node` computes the expected function of a value before it."""
    for x in _before(node):
        end, value = node, node.outputs[0]
        for _ in range(_STEPS):
            after = readers(value)
            if len(after) != 1 or after[0].op_type not in ("Add", "Mul", "Div"):
                break
            end, value = after[0], after[0].outputs[0]
            computed = _computed(value, x, 2 * _STEPS)
            if computed is None:
                break
            if np.abs(computed - expected).max() < _NEAR * np.abs(expected).max():
                return x, end
    return None


def _before(node: ir.Node) -> list[ir.Value]:
    """List the values that a node's input may be a function of, the nearest first."""
    found: list[ir.Value] = []
    todo = [(value, 0) for value in node.inputs]
    while todo:
        value, depth = todo.pop(0)
        if value is None or value in found or value.const_value is not None or depth > _STEPS:
            continue
        found.append(value)
        step = made_by(value, "Add", "Mul", "Div", "Pow")
        todo += [(item, depth + 1) for item in step.inputs] if step is not None else []
    return found


def _computed(value: ir.Value | None, x: ir.Value, depth: int) -> Grid | None:
    """Compute a value on the grid for x, or give None where it depends on more than x and single numbers."""
    if value is x:
        return _GRID
    number = scalar(value)
    if number is not None:
        return np.full_like(_GRID, number)
    node = value.producer() if value is not None else None
    if node is None or depth == 0 or node.op_type not in _FUNCTIONS:
        return None
    inputs = [_computed(item, x, depth - 1) for item in node.inputs]
    if any(item is None for item in inputs):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(_FUNCTIONS[node.op_type](*inputs), np.float64)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Div": np.divide, "Mul": np.multiply, "Pow": np.power, "Tanh": np.tanh,
    "Erf": lambda grid: np.array([math.erf(value) for value in grid]),
}  # fmt: skip


def _is_scaled(node: ir.Node) -> bool:
    product = made_by(node.inputs[0], "Mul")
    return product is not None and any(scalar(value) is not None for value in product.inputs)


def _is_quick(node: ir.Node) -> bool:
    product = made_by(node.inputs[0], "Mul")
    return product is not None and any(
        math.isclose(scalar(value) or 0.0, _QUICK, rel_tol=1e-3) for value in product.inputs
    )
