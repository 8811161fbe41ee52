"""Replace the exporter's infinite attention mask by a finite one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.passes.graph import Rewrites, add_constant, add_node, constant, made_by, readers, replace_uses

MASK_SIZE = "attention_mask_size"
INFINITE = 1e30
START_SIZE = 1e4  # exp(-1e4) is 0 in FP32; equalising replaces it by a size derived from the observed scores


def finite_mask(model: ir.Model) -> Rewrites:
    """Replace `Where(GatherND(attention_mask), 0, -3.4e38)` by `(attention_mask - 1) * size`.

    Before::

        attention_mask ─ Cast(bool) ─ GatherND ─ And ─┐
        Range, Shape, Expand, Concat ─────────────────┴─ Where(·, 0, -3.4e38) ─ Add(scores) ─ Softmax

    After::

        attention_mask ─ Cast(float) ─ Unsqueeze[1, 2] ─ Sub 1 ─ Mul size ─ Add(scores) ─ Softmax

    The new mask broadcasts over heads and queries. Only a condition that depends on `attention_mask` matches; a causal
    or local mask depends on positions too, which shows as moved outputs.
    """
    count, near = 0, []
    graph = model.graph
    masks = [value for value in graph.inputs if value.name == "attention_mask"]
    if not masks:
        return Rewrites(0, ("the graph has no input attention_mask",))
    for node in list(graph):
        if node.op_type != "Where" or not _is_mask(node):
            continue
        if not all(reader.op_type == "Add" for reader in readers(node.outputs[0])):
            near.append(f"{node.name}: an infinite mask, but it is read by something else than Add")
            continue
        if masks[0] not in _inputs_above(node):
            near.append(f"{node.name}: an infinite mask that does not depend on attention_mask")
            continue
        name = f"attention_bias_{count}" if count else "attention_bias"
        size = add_constant(graph, MASK_SIZE, np.array(START_SIZE, np.float32))
        one = add_constant(graph, "one", np.array(1.0, np.float32))
        axes = add_constant(graph, "mask_axes", np.array([1, 2], np.int64))
        mask = add_node(node, "Cast", [masks[0]], f"{name}/mask", {"to": int(ir.DataType.FLOAT)})
        mask = add_node(node, "Unsqueeze", [mask, axes], f"{name}/unsqueezed")
        mask = add_node(node, "Sub", [mask, one], f"{name}/shifted")
        replace_uses(node.outputs[0], add_node(node, "Mul", [mask, size], name))
        count += 1
    return Rewrites(count, tuple(near))


def _is_mask(node: ir.Node) -> bool:
    keep, drop = constant(node.inputs[1]), constant(node.inputs[2])
    if keep is None or drop is None or keep.dtype.kind != "f" or not keep.size or not drop.size:
        return False
    return bool(np.all(keep == 0) and np.all(drop <= -INFINITE)) and made_by(node.inputs[0], "Constant") is None


def _inputs_above(node: ir.Node) -> set[ir.Value]:
    """Collect the graph inputs that a node depends on."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    todo = list(node.inputs)
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
