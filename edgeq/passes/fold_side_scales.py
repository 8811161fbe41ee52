"""Fold scales in front of the attention scores into the weights of query and key."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, constant, is_read_once, made_by, scalar
from edgeq.passes.fold_attention_scale import scale_query


def fold_side_scales(model: ir.Model) -> Rewrites:
    """Multiply weight and bias of query and key by the factors that stand in front of their product.

    Before::

        MatMul(x, Wq) ─ Add(bq) ─ Reshape ─ Transpose ─ Mul(c) ─┐
        MatMul(x, Wk) ─ Add(bk) ─ Reshape ─ Transpose ─ Mul(c) ─┴─ MatMul

    After::

        MatMul(x, c Wq) ─ Add(c bq) ─ Reshape ─ Transpose ─┐
        MatMul(x, c Wk) ─ Add(c bk) ─ Reshape ─ Transpose ─┴─ MatMul
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "MatMul" or any(constant(value) is not None for value in node.inputs):
            continue
        for position, value in enumerate(tuple(node.inputs)):
            product = made_by(value, "Mul")
            if product is None:
                continue
            at = next((at for at, item in enumerate(product.inputs) if scalar(item) is not None), None)
            factor = scalar(product.inputs[at]) if at is not None else None
            if at is None or factor is None:
                continue
            if not is_read_once(product.outputs[0]):
                near.append(f"{product.name}: the scaled value is read elsewhere too")
                continue
            reason = scale_query(model.graph, product.inputs[1 - at], factor)
            if reason:
                near.append(f"{product.name}: {reason}")
                continue
            node.replace_input_with(position, product.inputs[1 - at])
            count += 1
    return Rewrites(count, tuple(near))
