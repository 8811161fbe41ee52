"""Recognise the attention mask that the pass `finite_mask` writes."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import (
    made_by,
)


def is_mask(value: ir.Value | None) -> bool:
    """Tell whether a value is a mask as `finite_mask` writes it."""
    product = made_by(value, "Mul")
    return product is not None and any(item is not None and item.name == MASK_SIZE for item in product.inputs)


MASK_SIZE = "attention_mask_size"
