"""Quantise Softmax to int16: exp from a table, int32 sums of each row, and a product with one over the sum.

LiteRT's int16 SOFTMAX gives every masked key the probability exp(-10), however low its score, and counts it in the sum
that all others are divided by: what padding takes grows with its length. Here the mask is added without rounding, and
what it has moved down has exactly 0::

    scores ─ Add(mask) ─┬─ Sub ─ Exp ─┬──────────────────────────────────────────── Mul ─ probabilities
                        └─ ReduceMax  └─ ReduceSum ─ index ─┬─ Gather(1/S, level 0) ─┴─ Add ─┘
                                                            └─ Gather(1/S, level 1) ─┘

The sum S of a row's values of exp is exact, and lies between one and the number of keys. A table of one over S for each
level, [8^k, 8^(k+1)), holds it to 1 in 4,096; the tables of the other levels hold 0 for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import add_constant, add_node, replace_uses
from edgeq.graph.roles import Role
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import QdqBuilder, QuantizedValue

UNIT = 2**15 - 1  # int16 value of 1.0: exp of the largest score of a row
SUM_LEVELS = 4  # sums below 8^4: texts of up to 4,095 tokens
LEVEL_BITS = 3  # a level's sums are up to 2^3 times its smallest
INDEX_BITS = 11  # the smallest sum of a level has this many bits in its index
INVERSE_STEP = 2.0**-16  # of the sum of the levels: with exp in 15 bits a product has 31
EXPONENTIALS = Affine(float(np.float32(1 / UNIT)), 0, -UNIT - 1, UNIT)
_SMALLEST_SUM_BITS = 15  # of a row's codes: one code is UNIT


def replace_softmax(builder: QdqBuilder, softmax: ir.Node, scores: ir.Value, params: Affine) -> None:
    """Replace an int16 Softmax by Exp, the inverse of each row's sum, and their product.

    Args:
        builder: of the graph.
        softmax: the node, which is left without readers.
        scores: the dequantised scores, or their sum with the mask, which is not rounded.
        params: of the scores without the mask.
    """
    graph, output = builder.graph, softmax.outputs[0]
    name = str(output.name)
    axis = add_constant(graph, f"{name}/axis", np.array([-1], np.int64))
    largest = add_node(softmax, "ReduceMax", [scores, axis], f"{name}/largest", role=Role.SOFTMAX_MAXIMUM)
    subtracted = _stored(builder, largest, params)
    difference = add_node(
        softmax, "Sub", [scores, subtracted.value], f"{name}/difference", role=Role.SOFTMAX_DIFFERENCE
    )
    weights = add_node(softmax, "Exp", [difference], f"{name}/weight", role=Role.SOFTMAX_EXPONENTIAL)
    exponential = _stored(builder, weights, EXPONENTIALS)
    total = add_node(softmax, "ReduceSum", [exponential.value, axis], f"{name}/sum", role=Role.SOFTMAX_SUM)
    unit = add_constant(graph, f"{name}/sum/unit", np.array(UNIT, np.float32))
    scaled = add_node(softmax, "Mul", [total, unit], f"{name}/sum/scaled")
    rounded = add_node(softmax, "Round", [scaled], f"{name}/sum/rounded")
    sums = add_node(softmax, "Cast", [rounded], f"{name}/sum/codes", {"to": ir.DataType.INT32.value})
    inverse: ir.Value | None = None
    for level in range(SUM_LEVELS):
        found = _inverse(builder, softmax, sums, name, level)
        inverse = found if inverse is None else add_node(
            softmax, "Add", [inverse, found], f"{name}/inverse_{level}", role=Role.SOFTMAX_DIVISOR
        )  # fmt: skip
    if inverse is None:
        raise ValueError(f"{softmax.name}: no level")
    result = add_node(
        softmax, "Mul", [exponential.value, inverse], f"{name}/probabilities", like=output, role=Role.SOFTMAX_QUOTIENT
    )
    _stored(builder, result, EXPONENTIALS)
    replace_uses(output, result)


def table_of_inverses(level: int) -> NDArray[np.int16]:
    """Give int16 values of 1/S by the index of S, for the sums of a level; 0 outside of it.

    The first level has a step of 2^-15, the others one of 2^-16. The last entry stands for all indices above.
    """
    last = 2 ** (INDEX_BITS + LEVEL_BITS)
    index = np.arange(last + 1, dtype=np.float64)
    sums = (index + 0.5) * 2.0 ** (_SMALLEST_SUM_BITS - INDEX_BITS + LEVEL_BITS * level) / UNIT
    values = np.minimum(np.rint(1.0 / (sums * _step(level))), UNIT)
    first = 2**INDEX_BITS - (level == 0)  # the smallest sum is one below a power of two
    return np.where((index >= first) & (index < last), values, 0.0).astype(np.int16)


def divisor(level: int) -> int:
    """Give what a row's sum is divided by for its index in a level's table."""
    return int(2 ** (_SMALLEST_SUM_BITS - INDEX_BITS + LEVEL_BITS * level))


def _step(level: int) -> float:
    return INVERSE_STEP * (2.0 if level == 0 else 1.0)


def _inverse(builder: QdqBuilder, before: ir.Node, sums: ir.Value, name: str, level: int) -> ir.Value:
    """Look 1/S up with Gather: 0 where S is of another level."""
    graph, stem = builder.graph, f"{name}/sum/level_{level}"
    table = table_of_inverses(level)
    by = add_constant(graph, f"{stem}/divisor", np.array(divisor(level), np.int32))
    end = add_constant(graph, f"{stem}/end", np.array(len(table) - 1, np.int32))
    divided = add_node(before, "Div", [sums, by], f"{stem}/divided")
    index = add_node(before, "Min", [divided, end], f"{stem}/index", role=Role.SOFTMAX_INDEX)
    stored = f"inverses_16bit_{level}"
    known = graph.initializers.get(stored)
    found = add_node(
        before, "Gather", [known if known is not None else add_constant(graph, stored, table), index],
        f"{stem}/inverse", role=Role.SOFTMAX_INVERSE,
    )  # fmt: skip
    found.dtype = ir.DataType.INT16
    params = Affine(_step(level), 0, -UNIT - 1, UNIT)
    return add_node(before, "DequantizeLinear", [found, *builder.parameters(stem, params, 16)], f"{stem}/dequantized")


def _stored(builder: QdqBuilder, value: ir.Value, params: Affine) -> QuantizedValue:
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name}: has no node")
    return builder.store(node, value, params, 16)
