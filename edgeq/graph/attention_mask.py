"""Recognise the attention mask that the passes `finite_mask` and `recover_padding_mask` write."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import made_by
from edgeq.graph.roles import Role

MASK_SIZE = "attention_mask_size"  # names the constant that the mask is multiplied by


def is_mask(value: ir.Value | None) -> bool:
    """Tell whether a value is the float mask `(mask - 1) * size` that is added to attention scores."""
    return value is not None and roles.has(value.producer(), Role.ATTENTION_MASK)


def is_of_padding_alone(value: ir.Value | None) -> bool:
    """Tell whether a value is the float mask with nothing in it that positions shut out (causal or local attention)."""
    node = value.producer() if value is not None and is_mask(value) else None
    shifted = made_by(node.inputs[0], "Sub") if node is not None else None
    row = made_by(shifted.inputs[0], "Unsqueeze") if shifted is not None else None
    return row is not None and made_by(row.inputs[0], "Cast") is not None


def is_of_padding(mask: ir.Value) -> bool:
    """Tell whether a mask (kept - 1) * size is of the attention mask itself, in other axes and another dtype."""
    maker = mask.producer()
    for value in maker.inputs if maker is not None else ():
        shifted = made_by(value, "Sub")
        kept = shifted.inputs[0] if shifted is not None else None
        while (step := made_by(kept, "Cast", "Unsqueeze", "Reshape", "Expand")) is not None:
            kept = step.inputs[0]
        if kept is not None and kept.is_graph_input():
            return True
    return False


def allowed_pattern(mask: ir.Value) -> ir.Value | None:
    """Find the causal or local pattern `allowed`, 1 or 0 by positions, in a mask (mask * allowed - 1) * size."""
    maker = mask.producer()
    for value in maker.inputs if maker is not None else ():
        shifted = made_by(value, "Sub")
        product = made_by(shifted.inputs[0], "Mul") if shifted is not None else None
        if product is not None:
            return next((item for item in product.inputs if follows_from_sizes(item)), None)
    return None
