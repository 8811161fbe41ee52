"""Add the mask to scores after everything else."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.attention_mask import is_mask, is_of_padding_alone
from edgeq.graph.edit import Rewrites, add_node, made_by, readers


def mask_last(model: ir.Model) -> Rewrites:
    """Add what positions give to the scores before the mask.

    Before::

        bias by distance ─ Add(mask) ─ Add(scores) ─ Softmax

    After::

        bias by distance ─ Add(scores) ─ Add(mask) ─ Softmax

    Then the range of scores is known without the mask, which gives the mask its size. The sum of bias and mask may be
    read by any number of layers: each gets additions of its own. Padding alone goes where another mask holds it, too.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Add" or not any(reader.op_type == "Softmax" for reader in readers(node.outputs[0])):
            continue
        values, masks = terms(node.outputs[0])
        if not masks or (len(masks) == 1 and any(value is masks[0] for value in node.inputs)):
            continue
        if not values:
            near.append(f"{node.name}: a mask is added to no scores")
            continue
        _write(node, [*values, *([mask for mask in masks if not is_of_padding_alone(mask)] or masks)])
        count += 1
    return Rewrites(count, tuple(near))


def terms(value: ir.Value | None) -> tuple[list[ir.Value], list[ir.Value]]:
    """Give what is added up to a value, scores first, and each mask among it once; a sum without one is one term."""
    if value is None or is_mask(value):
        return [], [value] if value is not None else []
    both = made_by(value, "Add")
    parts = sorted(map(terms, both.inputs), key=lambda part: bool(part[1])) if both is not None else []
    masks = list(dict.fromkeys(mask for part in parts for mask in part[1]))
    return ([term for part in parts for term in part[0]], masks) if masks else ([value], [])


def _write(node: ir.Node, terms: list[ir.Value]) -> None:
    """Add up terms in order; the node adds the last."""
    total, name = terms[0], f"{node.name}/unmasked"
    for place, term in enumerate(terms[1:-1]):
        added = add_node(node, "Add", [total, term], f"{name}_{place}" if place else name)
        added.shape, added.dtype = terms[0].shape, ir.DataType.FLOAT
        total = added
    node.replace_input_with(0, total)
    node.replace_input_with(1, terms[-1])
