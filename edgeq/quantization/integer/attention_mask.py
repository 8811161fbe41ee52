"""Write the attention mask that is added to int16 scores so that symmetric int16 represents both of its values."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import add_node, constant, made_by, readers
from edgeq.graph.roles import Role

_NAME = "attention_lift"


def non_negative_mask(of_mask: set[ir.Value], mask: ir.Value | None) -> ir.Value:
    """Return `mask * size` (padding 0, tokens +size) instead of `(mask - 1) * size`.

    Softmax gives the same, and symmetric int16, which has no zero point, represents both values exactly.

    Args:
        of_mask: values that follow from the mask alone; the new one is added.
        mask: what a model adds to scores.

    Raises:
        Unsupported: it has another form.
    """
    product = made_by(mask, "Mul")
    operands = list(product.inputs) if product is not None else []
    shifted = next((node for value in operands if (node := made_by(value, "Sub")) is not None), None)
    size = next((value for value in operands if constant(value) is not None), None)
    kept = shifted.inputs[0] if shifted is not None else None
    if product is None or kept is None or size is None:
        raise Unsupported("the attention mask is not of the form (mask - 1) * size")
    known = next((use for use in readers(kept) if roles.has(use, Role.KEPT_MASK)), None)
    if known is not None:
        return known.outputs[0]
    is_taken = any(value.name == _NAME for value in of_mask)
    result = add_node(
        product, "Mul", [kept, size], f"{_NAME}_{len(of_mask)}" if is_taken else _NAME, role=Role.KEPT_MASK
    )
    of_mask.add(result)
    return result
