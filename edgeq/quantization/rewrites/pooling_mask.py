"""Find the attention mask behind what a pooling reads."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import made_by

_ON_THE_WAY = ("Cast", "Equal", "Expand", "Reshape", "Unsqueeze")  # between the mask and where padding is filled


def mask_input(graph: ir.Graph) -> ir.Value | None:
    """Give the graph's input int64[batch, sequence] that is 1 for tokens and 0 for padding."""
    return next((value for value in graph.inputs if value.name == "attention_mask"), None)


def origin(value: ir.Value | None) -> ir.Value | None:
    """Give what a value was before it was cast, compared and reshaped."""
    while (node := made_by(value, *_ON_THE_WAY)) is not None:
        value = node.inputs[0]
    return value
