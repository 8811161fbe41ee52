"""Find GELU in its decomposed forms."""

from __future__ import annotations

import math

import onnx_ir as ir

from edgeq.passes.graph import Rewrites, add_node, constant, made_by, replace_uses, scalar


def recover_gelu(model: ir.Model) -> Rewrites:
    """Replace `0.5 * x * (1 + Erf(x / sqrt(2)))` by one `Gelu`, whatever the order of its products.

    Before::

        x ─ Div(sqrt 2) ─ Erf ─ Add(1) ─ Mul(x) ─ Mul(0.5)

    After::

        x ─ Gelu
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Erf":
            continue
        x = _unscaled(node.inputs[0])
        end = _end(node, x) if x is not None else None
        if x is None or end is None:
            near.append(f"{node.name}: an Erf that is no part of 0.5 * x * (1 + Erf(x / sqrt(2)))")
            continue
        replace_uses(end.outputs[0], add_node(end, "Gelu", [x], f"{end.name}/gelu"))
        count += 1
    return Rewrites(count, tuple(near))


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
