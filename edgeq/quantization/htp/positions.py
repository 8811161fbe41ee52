"""Quantise what follows from positions alone: rotations (RoPE), biases by distance, causal and local masks.

A QDQ model computes it in float from the length and quantises it; lowering for one length stores the integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.evaluate import computed
from edgeq.quantization.qdq import QuantizedValue
from edgeq.quantization.walk import Walk

_LONGEST = 512  # tokens: biases for each pair of them fill memory with the square


def quantized_positions(walk: Walk, value: ir.Value, bits: int, node: ir.Node, longest: int) -> QuantizedValue:
    """Quantise a float tensor that follows from the length to uint8 or uint16, by its range in a long text.

    That is one of 512 tokens, or of as many as the table of positions has. Calibration texts need not be that long, so
    what was observed of the tensor does not count.

    Args:
        walk: of the graph.
        value: follows from sizes alone.
        bits: 8 or 16.
        node: the first operator that reads it.
        longest: tokens that a text can have.
    """
    builder = walk.builder
    if (value, bits) not in builder.converted:
        ones = np.ones((1, min(longest, _LONGEST)), np.int64)
        found = computed(value, {"input_ids": ones, "attention_mask": ones})
        builder.quantize_once(value, builder.cover(float(found.min()), float(found.max()), bits), bits, node)
    return builder.converted[value, bits]
