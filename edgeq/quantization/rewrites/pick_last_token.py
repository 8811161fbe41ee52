"""Pick the last token by a MatMul with ones and zeros."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, made_by, replace_uses, required
from edgeq.graph.roles import Role
from edgeq.passes.pool_by_matmul import POOLING
from edgeq.quantization.rewrites.pooling_mask import mask_input, origin


def pick_last_token(model: ir.Model) -> Rewrites:
    """Replace the lookup of the last token by a MatMul, as `edgeq.passes.pool_by_matmul` writes the mean.

    Before::

        GatherElements(h * mask, size - 1 - ArgMax(mask from its end))

    After::

        MatMul(mask * (CumSum(mask) == ReduceSum(mask)), h)
    """
    mask = mask_input(model.graph)
    count, near = 0, []
    for node in list(model.graph):
        masked = made_by(node.inputs[0], "Mul") if node.op_type == "GatherElements" else None
        if mask is None or masked is None:
            continue
        position = node.inputs[1]
        while (step := made_by(position, "Expand", "Unsqueeze", "Cast", "Reshape")) is not None:
            position = step.inputs[0]
        hidden = next((value for value in masked.inputs if origin(value) is not mask), None)
        if hidden is None or all(origin(value) is not mask for value in masked.inputs):
            near.append(f"{node.name}: what is looked up is not multiplied by the attention mask")
        elif not _counts_from_the_end(position):
            near.append(f"{node.name}: the position is not that of the last token")
        else:
            _write_product(model.graph, node, mask, hidden)
            count += 1
    return Rewrites(count, tuple(near))


def _write_product(graph: ir.Graph, gather: ir.Node, mask: ir.Value, hidden: ir.Value) -> None:
    name = f"{POOLING}/{gather.name}"
    axis = add_constant(graph, f"{name}/axis", np.array(1, np.int64))
    axes = add_constant(graph, f"{name}/axes", np.array([1], np.int64))
    seen = add_node(gather, "CumSum", [mask, axis], f"{name}/seen")
    count = add_node(gather, "ReduceSum", [mask, axes], f"{name}/count", {"keepdims": 1})
    is_last = add_node(gather, "Equal", [seen, count], f"{name}/is_last")
    whole = add_node(gather, "Cast", [is_last], f"{name}/last_or_padding", {"to": ir.DataType.INT64.value})
    last = add_node(gather, "Mul", [whole, mask], f"{name}/last")
    weights = add_node(gather, "Cast", [last], f"{name}/shares", {"to": ir.DataType.FLOAT.value})
    row = add_node(gather, "Unsqueeze", [weights, axes], f"{name}/weights")
    picked = add_node(gather, "MatMul", [row, hidden], f"{name}/picked", like=gather.outputs[0], role=Role.POOLING)
    roles.give(required(picked.producer()), Role.PICKED_TOKEN)
    replace_uses(gather.outputs[0], picked)


def _counts_from_the_end(position: ir.Value | None) -> bool:
    """Tell whether a position is the size minus what ArgMax finds in the mask read backwards."""
    outer = made_by(position, "Sub")
    inner = made_by(outer.inputs[0], "Sub") if outer is not None else None
    chosen = made_by(inner.inputs[1], "Where") if inner is not None else None
    found = made_by(chosen.inputs[2], "ArgMax") if chosen is not None else made_by(position, "ArgMax")
    backwards = made_by(found.inputs[0], "Slice") if found is not None else None
    steps = constant(backwards.inputs[4]) if backwards is not None and len(backwards.inputs) > 4 else None
    return steps is not None and steps.tolist() == [-1]
