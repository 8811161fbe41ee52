"""Turn mean pooling into one product with mask / n."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, made_by, replace_uses, scalar
from edgeq.graph.roles import Role

POOLING = "pooling"  # begins the names of what is written here


def pool_by_matmul(model: ir.Model) -> Rewrites:
    """Replace `ReduceSum(h * mask) / ReduceSum(mask)` by `(mask / n) · h`.

    Before::

        h[batch, sequence, dim] ─ Mul(mask[batch, sequence, 1]) ─ ReduceSum(1) ─┐
        mask ─ ReduceSum(1) ─ Clip(1e-9) ───────────────────────────────────────┴─ Div

    After::

        mask ─ Transpose ─ Div(n) ─ MatMul(·, h) ─ Squeeze(1)

    The weights mask / n lie in [0, 1]; the sum before, which grows with the length, is never formed. Where the model
    divides by sqrt(n), so do the weights. They do not add up to one then, and the product has no role.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Div":
            continue
        total, root = made_by(node.inputs[0], "ReduceSum"), made_by(node.inputs[1], "Sqrt")
        number = made_by(root.inputs[0] if root is not None else node.inputs[1], "Clip", "Max")
        size = root if root is not None else number
        masked = made_by(total.inputs[0], "Mul") if total is not None else None
        if total is None or number is None or size is None or masked is None:
            continue
        tokens = made_by(number.inputs[0], "ReduceSum")
        mask = next((value for value in masked.inputs if tokens is not None and value is tokens.inputs[0]), None)
        hidden = next((value for value in masked.inputs if value is not mask), None)
        if tokens is None or mask is None or hidden is None:
            near.append(f"{node.name}: the divisor is no sum of the same mask")
            continue
        if not (_sums_sequence(total) and _sums_sequence(tokens)):
            near.append(f"{node.name}: sums over another axis than 1")
            continue
        _write_product(node, mask, hidden, size)
        count += 1
    return Rewrites(count, tuple(near))


def _write_product(node: ir.Node, mask: ir.Value, hidden: ir.Value, size: ir.Node) -> None:
    name, role = (POOLING, Role.POOLING) if size.op_type != "Sqrt" else (f"root_{POOLING}", None)
    axis = add_constant(node.graph, f"{name}_axis", np.array([1], np.int64))  # type: ignore[arg-type]
    row = add_node(node, "Transpose", [mask], f"{name}/mask", {"perm": [0, 2, 1]})
    divisor = add_node(node, "Unsqueeze", [size.outputs[0], axis], f"{name}/count")
    weights = add_node(node, "Div", [row, divisor], f"{name}/weights")
    pooled = add_node(node, "MatMul", [weights, hidden], f"{name}/pooled", role=role)
    replace_uses(node.outputs[0], add_node(node, "Squeeze", [pooled, axis], f"{name}/mean"))


def _sums_sequence(node: ir.Node) -> bool:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    return axes is not None and scalar(node.inputs[1]) == 1.0 and axes.size == 1 and keep == 0
