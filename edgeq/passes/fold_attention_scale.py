"""Fold the scale of the attention scores into the query weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import Rewrites, add_constant, constant, is_read_once, made_by, readers, replace_uses, scalar
from edgeq.graph.operators import LINEAR_IN_FIRST
from edgeq.graph.rms_norm import root_mean_square


def fold_attention_scale(model: ir.Model) -> Rewrites:
    """Multiply the query weights and bias by 1/sqrt(d) and drop the `Mul` or `Div` behind the scores.

    Before::

        MatMul(x, Wq) ─ Add(bq) ─ Reshape ─ Transpose ─ MatMul(·, keys) ─ Mul(1/sqrt(d)) ─ Add(mask) ─ Softmax

    After::

        MatMul(x, Wq/sqrt(d)) ─ Add(bq/sqrt(d)) ─ Reshape ─ Transpose ─ MatMul(·, keys) ─ Add(mask) ─ Softmax

    Between weights and scores may stand whatever is linear, such as a rotation by position. Where queries are
    normalised, the gain of the normalisation takes the factor.
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
        reason = scale_query(model.graph, scores.inputs[0], factor if node.op_type == "Mul" else 1.0 / factor)
        if reason:
            near.append(f"{node.name}: {reason}")
            continue
        replace_uses(node.outputs[0], scores.outputs[0])
        count += 1
    return Rewrites(count, tuple(near))


def scale_query(graph: ir.Graph, value: ir.Value | None, factor: float) -> str:
    """Walk up from the scores' left operand to its weights and scale them; give the reason when there are none."""
    found = _source(value)
    if isinstance(found, str):
        return found
    mean_square = root_mean_square(found.producer())
    if mean_square is not None:
        _scale(graph, mean_square.end, mean_square.position, factor)
        return ""
    add = made_by(found, "Add")
    product: ir.Value | None = found
    bias_at = -1
    if add is not None:
        bias_at = next((at for at, item in enumerate(add.inputs) if constant(item) is not None), -1)
        if bias_at < 0:
            return f"{add.name} is no bias of this product alone"
        product = add.inputs[1 - bias_at]
    matmul = made_by(product, "MatMul")
    weight = constant(matmul.inputs[1]) if matmul is not None else None
    is_shared = add is not None and (product is None or not is_read_once(product))
    if matmul is None or weight is None or is_shared:
        return "the query is no product with constant weights of its own"
    _scale(graph, matmul, 1, factor)
    if add is not None:
        _scale(graph, add, bias_at, factor)
    return ""


def _scale(graph: ir.Graph, owner: ir.Node, position: int, factor: float) -> None:
    old = owner.inputs[position]
    array = constant(old)
    if old is None or array is None:
        raise ValueError(f"{owner.name}: its operand {position} is no constant")
    scaled = (array.astype(np.float64) * factor).astype(np.float32)
    owner.replace_input_with(position, add_constant(graph, f"{old.name}/scaled", scaled))


def _source(value: ir.Value | None) -> ir.Value | str:
    """Find the one value that linear operators, such as a rotation by position, make another of; or say why not."""
    linear: list[ir.Node] = []
    sources: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        node = each.producer() if each is not None else None
        if each is None or node is None:
            return "the query is made of an input"
        if node in linear or each in sources:
            continue
        operands = _linear_operands(node)
        if operands:
            linear.append(node)
            waiting += operands
        else:
            sources.add(each)
    if len(sources) != 1:
        return "the query is made of several values"
    (source,) = sources
    top = value.producer() if value is not None else None
    for each in [source, *(output for node in linear for output in node.outputs if node is not top)]:
        if not set(readers(each)) <= set(linear) and each is not value:
            return f"{each.name} is read elsewhere too"
    if value is not None and not is_read_once(value):
        return f"{value.name} is read elsewhere too"
    return source


def _linear_operands(node: ir.Node) -> list[ir.Value | None]:
    """Give what a node is linear in, or nothing where it is not linear or only adds a constant."""
    if node.op_type in LINEAR_IN_FIRST:
        return [node.inputs[0]]
    if node.op_type == "Concat":
        return list(node.inputs)
    if node.op_type == "Add" and all(constant(item) is None for item in node.inputs):
        return list(node.inputs)
    if node.op_type == "Mul" and root_mean_square(node) is None:
        fixed = [item for item in node.inputs if constant(item) is not None or follows_from_sizes(item)]
        return [item for item in node.inputs if item not in fixed] if len(fixed) == 1 else []
    return []
