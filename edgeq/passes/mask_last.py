"""Add the mask to scores after everything else."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.attention_mask import is_mask
from edgeq.graph.edit import Rewrites, add_node, made_by, readers


def mask_last(model: ir.Model) -> Rewrites:
    """Add what positions give to the scores before the mask.

    Before::

        bias by distance ─ Add(mask) ─ Add(scores) ─ Softmax

    After::

        bias by distance ─ Add(scores) ─ Add(mask) ─ Softmax

    Then the range of scores is known without the mask, which gives the mask its size.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Add" or not any(reader.op_type == "Softmax" for reader in readers(node.outputs[0])):
            continue
        for position, value in enumerate(node.inputs):
            both, scores = made_by(value, "Add"), node.inputs[1 - position]
            place = next((at for at, item in enumerate(both.inputs) if is_mask(item)), -1) if both is not None else -1
            if both is None or scores is None or place < 0:
                continue
            bias, mask = both.inputs[1 - place], both.inputs[place]
            if bias is None or mask is None or is_mask(scores):
                near.append(f"{node.name}: a masked bias is added to no scores")
                continue
            total = add_node(node, "Add", [scores, bias], f"{node.name}/unmasked")
            total.shape, total.dtype = scores.shape, ir.DataType.FLOAT
            node.replace_input_with(0, total)
            node.replace_input_with(1, mask)
            count += 1
            break
    return Rewrites(count, tuple(near))
