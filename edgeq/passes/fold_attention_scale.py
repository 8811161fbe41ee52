"""Fold the scale of the attention scores into the query weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.passes.graph import Rewrites, add_constant, constant, is_read_once, made_by, replace_uses, scalar


def fold_attention_scale(model: ir.Model) -> Rewrites:
    """Multiply the query weights and bias by 1/sqrt(d) and drop the `Mul` or `Div` behind the scores.

    Before::

        MatMul(x, Wq) ─ Add(bq) ─ Reshape ─ Transpose ─ MatMul(·, keys) ─ Mul(1/sqrt(d)) ─ Add(mask) ─ Softmax

    After::

        MatMul(x, Wq/sqrt(d)) ─ Add(bq/sqrt(d)) ─ Reshape ─ Transpose ─ MatMul(·, keys) ─ Add(mask) ─ Softmax
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
            continue
        scores, factor = made_by(node.inputs[0], "MatMul"), scalar(node.inputs[1])
        if scores is None or factor is None or constant(scores.inputs[1]) is not None:
            continue
        if not is_read_once(scores.outputs[0]):
            near.append(f"{node.name}: the scores are read elsewhere too")
            continue
        reason = _scale_query(model.graph, scores.inputs[0], factor if node.op_type == "Mul" else 1.0 / factor)
        if reason:
            near.append(f"{node.name}: {reason}")
            continue
        replace_uses(node.outputs[0], scores.outputs[0])
        count += 1
    return Rewrites(count, tuple(near))


def _scale_query(graph: ir.Graph, value: ir.Value | None, factor: float) -> str:
    """Walk up from the scores' left operand to its weights and scale them; give the reason when there are none."""
    while value is not None and (step := made_by(value, "Transpose", "Reshape", "Squeeze", "Unsqueeze")) is not None:
        if not is_read_once(value):
            return f"{value.name} is read elsewhere too"
        value = step.inputs[0]
    add = made_by(value, "Add")
    product = value
    bias_at = -1
    if add is not None:
        bias_at = next((at for at, item in enumerate(add.inputs) if constant(item) is not None), -1)
        if bias_at < 0 or not is_read_once(add.outputs[0]):
            return f"{add.name} is no bias of this product alone"
        product = add.inputs[1 - bias_at]
    matmul = made_by(product, "MatMul")
    weight = constant(matmul.inputs[1]) if matmul is not None else None
    if matmul is None or weight is None or product is None or not is_read_once(product):
        return "the query is no product with constant weights of its own"
    targets = [(matmul, 1, weight)]
    if add is not None:
        bias = constant(add.inputs[bias_at])
        if bias is not None:
            targets.append((add, bias_at, bias))
    for owner, position, array in targets:
        old = owner.inputs[position]
        scaled = (array.astype(np.float64) * factor).astype(np.float32)
        owner.replace_input_with(position, add_constant(graph, f"{old.name if old else 'query'}/scaled", scaled))
    return ""
