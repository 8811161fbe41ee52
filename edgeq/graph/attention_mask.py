"""Recognise the attention mask that the passes `finite_mask` and `recover_padding_mask` write."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.roles import Role

MASK_SIZE = "attention_mask_size"  # names the constant that the mask is multiplied by


def is_mask(value: ir.Value | None) -> bool:
    """Tell whether a value is the float mask `(mask - 1) * size` that is added to attention scores."""
    return value is not None and roles.has(value.producer(), Role.ATTENTION_MASK)
