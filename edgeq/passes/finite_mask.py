"""Replace the exporter's infinite attention mask by a finite one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.attention_mask import MASK_SIZE
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, made_by, readers, replace_uses
from edgeq.graph.operators import SAME_VALUES
from edgeq.graph.roles import Role
from edgeq.passes.known_truths import truth

INFINITE = 1e30
START_SIZE = 1e4  # exp(-1e4) is 0 in FP32; equalising replaces it by a size derived from the observed scores


def finite_mask(model: ir.Model) -> Rewrites:
    """Replace `Where(GatherND(attention_mask), 0, -3.4e38)` by `(attention_mask - 1) * size`.

    Before::

        attention_mask ─ Cast(bool) ─ GatherND ─ And ─┐
        Range, Shape, Expand, Concat ─────────────────┴─ Where(·, 0, -3.4e38) ─ Add(scores) ─ Softmax

    After::

        attention_mask ─ Cast(float) ─ Unsqueeze[1, 2] ─ Sub 1 ─ Mul size ─ Add(scores) ─ Softmax

    The new mask broadcasts over heads and queries. Where each position may look at some others only (causal or local
    attention), the mask is multiplied by that first, which is computed from positions as before::

        positions ─ LessOrEqual ─ Cast(float) ─┐
        attention_mask ─ Cast ─ Unsqueeze ─── Mul ─ Sub 1 ─ Mul size ─ Add(scores) ─ Softmax

    A mask that fills scores, `Where(padding, -3.4e38, scores)`, is added to them instead.
    """
    count, near = 0, []
    graph = model.graph
    masks = [value for value in graph.inputs if value.name == "attention_mask"]
    if not masks:
        return Rewrites(0, ("the graph has no input attention_mask",))
    for node in list(graph):
        scores = _filled(node) if node.op_type == "Where" else None
        if node.op_type != "Where" or (scores is None and not _is_mask(node)):
            continue
        if scores is None and not all(reader.op_type == "Add" for reader in readers(node.outputs[0])):
            near.append(f"{node.name}: an infinite mask, but it is read by something else than Add")
            continue
        if scores is not None and _has_limits(node.inputs[0]):
            near.append(f"{node.name}: positions decide, too, where it fills scores")
            continue
        if masks[0] not in _inputs_above(node.inputs[0]):
            near.append(f"{node.name}: an infinite mask that does not depend on attention_mask")
            continue
        bias = limited_mask(graph, node, masks[0], _limits(node.inputs[0]) if scores is None else [])
        if scores is not None:
            bias = add_node(node, "Add", [scores, bias], f"{node.name}/masked")
            bias.shape, bias.dtype = node.outputs[0].shape, ir.DataType.FLOAT
        replace_uses(node.outputs[0], bias)
        count += 1
    return Rewrites(count, tuple(near))


def limited_mask(graph: ir.Graph, node: ir.Node, mask: ir.Value, limits: list[ir.Value]) -> ir.Value:
    """Write what is added to scores before a node: 0 where a position may look, -size elsewhere.

    Args:
        graph: whose masks are numbered.
        node: stands behind the new ones.
        mask: int64[batch, sequence], the graph's input.
        limits: conditions that follow from sizes; a query sees a key only where all of them hold.
    """
    number = sum(roles.has(each, Role.ATTENTION_MASK) for each in graph)
    name = f"attention_bias_{number}" if number else "attention_bias"
    known = graph.initializers.get(MASK_SIZE)
    size = known if known is not None else add_constant(graph, MASK_SIZE, np.array(START_SIZE, np.float32))
    one = add_constant(graph, "one", np.array(1.0, np.float32))
    axes = add_constant(graph, "mask_axes", np.array([1, 2], np.int64))
    kept = add_node(node, "Cast", [mask], f"{name}/mask", {"to": int(ir.DataType.FLOAT)})
    kept = add_node(node, "Unsqueeze", [kept, axes], f"{name}/unsqueezed")
    if limits:
        allowed = limits[0]
        for place, limit in enumerate(limits[1:]):
            allowed = add_node(node, "And", [allowed, limit], f"{name}/limits_{place}")
        allowed = add_node(node, "Cast", [allowed], f"{name}/allowed", {"to": int(ir.DataType.FLOAT)})
        kept = add_node(node, "Mul", [kept, allowed], f"{name}/limited")
    shifted = add_node(node, "Sub", [kept, one], f"{name}/shifted")
    return add_node(node, "Mul", [shifted, size], name, role=Role.ATTENTION_MASK)


def _limits(condition: ir.Value | None) -> list[ir.Value]:
    """List the parts of a condition that positions decide, but for those that always hold."""
    while (reshaped := made_by(condition, "Reshape")) is not None:
        condition = reshaped.inputs[0]
    both = made_by(condition, "And")
    if both is not None:
        return list(dict.fromkeys(limit for value in both.inputs for limit in _limits(value)))
    if condition is None or truth(condition) or not follows_from_sizes(condition):
        return []
    compared = made_by(condition, "GreaterOrEqual")
    least = constant(compared.inputs[1]) if compared is not None else None
    always_holds = least is not None and bool(np.all(least <= 0)) and _is_position(compared.inputs[0])  # type: ignore[union-attr]
    return [] if always_holds else [condition]


def _has_limits(condition: ir.Value | None) -> bool:
    """Tell whether positions decide a part of a condition."""
    if condition is None or truth(condition) is not None:
        return False
    step = made_by(condition, "And", "Or", "Not", *SAME_VALUES)
    if step is None or follows_from_sizes(condition):
        return follows_from_sizes(condition)
    return any(map(_has_limits, step.inputs if step.op_type in ("And", "Or") else step.inputs[:1]))


def _is_position(value: ir.Value | None) -> bool:
    """Tell whether a value is 0, 1, 2, … whatever its axes."""
    while (step := made_by(value, "Unsqueeze", "Cast", "Expand", "Reshape")) is not None:
        value = step.inputs[0]
    made = made_by(value, "Range")
    start = constant(made.inputs[0]) if made is not None else None
    return start is not None and float(start.reshape(-1)[0]) >= 0


def _filled(node: ir.Node) -> ir.Value | None:
    """Give the scores that a Where fills with an infinite value for softmax, or None."""
    fill, scores = constant(node.inputs[1]), node.inputs[2]
    if fill is None or fill.dtype.kind != "f" or fill.size != 1 or constant(scores) is not None:
        return None
    is_softmax = all(reader.op_type == "Softmax" for reader in readers(node.outputs[0]))
    return scores if is_softmax and fill.reshape(-1)[0] <= -INFINITE else None


def _is_mask(node: ir.Node) -> bool:
    keep, drop = constant(node.inputs[1]), constant(node.inputs[2])
    if keep is None or drop is None or keep.dtype.kind != "f" or not keep.size or not drop.size:
        return False
    return bool(np.all(keep == 0) and np.all(drop <= -INFINITE)) and made_by(node.inputs[0], "Constant") is None


def _inputs_above(last: ir.Value | None) -> set[ir.Value]:
    """Collect the graph inputs that a value depends on."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    todo = [last]
    while todo:
        value = todo.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            found.add(value)
        producer = value.producer()
        if producer is not None:
            todo.extend(producer.inputs)
    return found
