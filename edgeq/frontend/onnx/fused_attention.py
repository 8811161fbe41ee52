"""Write com.microsoft Attention and MultiHeadAttention as MatMul, Softmax and MatMul."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.frontend.onnx.fused_node import CannotExpand, FusedNode
from edgeq.graph.edit import dims

_FILTER = -10000.0


def attention(fused: FusedNode) -> dict[int, ir.Value]:
    """Write Attention, whose one weight projects to query, key and value: three MatMuls and what `_attend` writes.

    Raises:
        CannotExpand: it is causal, rotates positions, has a past, or another mask than [batch, sequence].
    """
    fused.refuse_inputs(4, 6)
    weight, sizes = fused.array(1), fused.attribute("qkv_hidden_sizes", None)
    third = weight.shape[1] // 3
    ends = np.cumsum(sizes if sizes is not None else [third] * 3)[:2].tolist()
    biases = np.split(fused.array(2), ends) if fused.input(2) is not None else [None] * 3
    parts = []
    for name, columns, bias in zip(("query", "key", "value"), np.split(weight, ends, axis=1), biases, strict=True):
        kept = np.ascontiguousarray(columns)
        part = fused.add("MatMul", [fused.needed(0), fused.put(f"{name}.weight", kept)], f"{name}.product")
        if bias is not None:
            part = fused.add("Add", [part, fused.put(f"{name}.bias", bias)], f"{name}.sum")
        parts.append(part)
    width = ends[0]
    return {0: _attend(fused, parts, width, kept.shape[1], fused.input(3), fused.input(5))}


def multi_head_attention(fused: FusedNode) -> dict[int, ir.Value]:
    """Write MultiHeadAttention, which reads projected query, key and value, and may add a bias to each.

    Raises:
        CannotExpand: it is causal, has a past, another mask than [batch, sequence], or a width that is not known.
    """
    fused.refuse_inputs(6, 7, 8, 9)
    parts = [fused.needed(position) for position in range(3)]
    widths = [(dims(part) or [None])[-1] for part in parts]
    if fused.input(3) is not None:
        bias = fused.array(3)
        third = len(bias) // 3
        known = [width if isinstance(width, int) else third for width in widths]
        widths = [*known]
        rows = np.split(bias, np.cumsum(known)[:2].tolist())
        parts = [
            fused.add("Add", [part, fused.put(f"{name}.bias", row)], f"{name}.sum")
            for name, part, row in zip(("query", "key", "value"), parts, rows, strict=True)
        ]
    if not isinstance(widths[0], int) or not isinstance(widths[2], int):
        raise CannotExpand("the width of its query is not known")
    return {0: _attend(fused, parts, widths[0], widths[2], fused.input(4), fused.input(5))}


def _attend(
    fused: FusedNode, parts: list[ir.Value], width: int, value_width: int, mask: ir.Value | None, bias: ir.Value | None
) -> ir.Value:
    """Write MatMul, Softmax and MatMul over query, key and value, float32[batch, sequence, width] each."""
    if fused.attribute("unidirectional", 0) or fused.attribute("do_rotary", 0):
        raise CannotExpand("it is causal, or rotates positions")
    heads = fused.attribute("num_heads", 0)
    split = []
    for name, part, size, order in (
        ("query", parts[0], width, [0, 2, 1, 3]),
        ("key", parts[1], width, [0, 2, 3, 1]),
        ("value", parts[2], value_width, [0, 2, 1, 3]),
    ):
        shaped = fused.add("Reshape", [part, fused.ints(f"{name}_shape", 0, 0, heads, size // heads)], f"{name}_heads")
        split.append(fused.add("Transpose", [shaped], f"{name}_turned", perm=order))
    scores = fused.add("MatMul", split[:2], "scores")
    scale = fused.attribute("scale", 0.0) or (width // heads) ** -0.5
    scores = fused.add("Mul", [scores, fused.put("scale", np.array(scale, np.float32))], "scaled")
    if bias is not None:
        scores = fused.add("Add", [scores, bias], "biased")
    if mask is not None:
        scores = fused.add("Add", [scores, _mask_bias(fused, mask)], "masked")
    context = fused.add("MatMul", [fused.add("Softmax", [scores], "shares", axis=-1), split[2]], "context")
    turned = fused.add("Transpose", [context], "context_turned", perm=[0, 2, 1, 3])
    return fused.add("Reshape", [turned, fused.ints("context_shape", 0, 0, value_width)], "attended")


def _mask_bias(fused: FusedNode, mask: ir.Value) -> ir.Value:
    """Turn an attention mask[batch, sequence] of ones and zeros into the value that is added to the scores."""
    if len(dims(mask) or [0, 0]) != 2:
        raise CannotExpand("its mask is no [batch, sequence] of ones and zeros")
    ones = fused.add("Cast", [mask], "mask_ones", to=int(ir.DataType.FLOAT))
    row = fused.add("Unsqueeze", [ones, fused.ints("mask_axes", 1, 2)], "mask_row")
    shifted = fused.add("Sub", [row, fused.put("one", np.array(1, np.float32))], "mask_shifted")
    size = fused.put("mask_filter", np.array(-fused.attribute("mask_filter_value", _FILTER), np.float32))
    return fused.add("Mul", [shifted, size], "mask_bias")
