"""Quantise Softmax to int8 without its division, and divide the product with the values by the row's sum instead.

An int8 probability is a multiple of 1/256: in a long text attention is so thin that most probabilities round to 0 or
1/256. exp(score - largest score of the row) uses all 256 values instead, whatever the length; its sum S over a row is
exact, and the product is divided by S behind::

    scores ─┬─ Sub ─ Exp ─┬─ ReduceSum ─ index ─┬─ Gather(1/S, level 0) ─ Mul ─┬─ Add ─ Add ... ─ context
            └─ ReduceMax  │                     └─ Gather(1/S, level 1) ─ Mul ─┘
                          ├─ MatMul(values), step u ─────────────────────┘  │
                          └─ MatMul(values), step 4 u ──────────────────────┘

A product grows with S, and its int8 values have one scale for all rows. So there is a product for each level of S,
[4^k, 4^(k+1)), with a scale four times that of the level below. A row takes the product of its level: the tables of 1/S
for the other levels hold 0 for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import add_constant, add_node, replace_uses
from edgeq.graph.roles import Role
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import QdqBuilder, QuantizedValue, symmetric

LEVELS = 5  # sums up to 4^5: texts of up to 1,024 tokens
RATIO = 4
EXPONENTIALS = Affine(float(np.float32(1 / 255)), -128, -128, 127)  # the largest of a row is 1.0 exactly
DIFFERENCES_ZERO = 127  # no score lies above the largest of its row
SUM, LARGEST, DIFFERENCE, WEIGHT, LEVEL = "/sum", "/largest", "/difference", "/weight", "/level_{}"
_UNIT = 255  # how many steps make 1.0
LAST_INDEX = RATIO * (_UNIT + 1) - 1  # of a level
_HEADROOM = 2.0  # a product's range over the largest context, where S is smallest in its level: long rows average


def table_of_inverses(level: int) -> NDArray[np.int8]:
    """Give int8 values of 1/S by the index of S, which is S over 4^level rounded down; 0.0 outside of the level.

    The last entry stands for all indices above.
    """
    index = np.arange(LAST_INDEX + 2, dtype=np.float64)
    middle = index + (0.5 if level else 0.0)
    values = np.rint(255.0 * _UNIT / np.maximum(middle, _UNIT)) - 128.0  # 1/S in units of 1/255 of the level's largest
    first = _UNIT + 1 if level else _UNIT
    return np.where((index >= first) & (index <= LAST_INDEX), values, -128.0).astype(np.int8)


class DeferredSoftmax:
    """Write attention with its division behind the MatMul with the values."""

    def __init__(self, builder: QdqBuilder) -> None:
        """Begin with no attention seen."""
        self._builder = builder
        self._inverses: dict[ir.Value, list[QuantizedValue]] = {}  # by what exp gave: 1/S for each level

    def takes(self, left: ir.Value | None) -> bool:
        """Tell whether a MatMul's left operand is what exp gave, not yet divided by its sum."""
        return left in self._inverses

    def replace_softmax(self, softmax: ir.Node) -> None:
        """Replace Softmax by Exp and one over the sum of each row."""
        output = softmax.outputs[0]
        name = str(output.name)
        scores = self._builder.read(softmax.inputs[0], 8, softmax)
        axis = add_constant(self._builder.graph, f"{name}/axis", np.array([-1], np.int64))
        largest = add_node(softmax, "ReduceMax", [scores.value, axis], f"{name}{LARGEST}", role=Role.SOFTMAX_MAXIMUM)
        subtracted = self._store(largest, scores.params)
        difference = add_node(softmax, "Sub", [scores.value, subtracted.value], f"{name}{DIFFERENCE}")
        below = self._store(difference, Affine(scores.params.scale, DIFFERENCES_ZERO, -128, 127))
        exponential = self._store(add_node(softmax, "Exp", [below.value], f"{name}{WEIGHT}"), EXPONENTIALS)
        self._builder.quantized[output] = exponential
        total = add_node(softmax, "ReduceSum", [exponential.value, axis], f"{name}{SUM}", role=Role.SOFTMAX_SUM)
        unit = add_constant(self._builder.graph, f"{name}{SUM}/unit", np.array(_UNIT, np.float32))
        scaled = add_node(softmax, "Mul", [total, unit], f"{name}{SUM}/scaled")
        rounded = add_node(softmax, "Round", [scaled], f"{name}{SUM}/rounded")
        sums = add_node(softmax, "Cast", [rounded], f"{name}{SUM}/codes", {"to": ir.DataType.INT32.value})
        self._inverses[output] = [self._inverse(softmax, sums, name, level) for level in range(LEVELS)]

    def replace_product(self, product: ir.Node) -> None:
        """Replace the MatMul with the values by one for each level, times one over the sum of each row."""
        exponentials, context = product.inputs[0], product.outputs[0]
        if exponentials is None:
            raise ValueError(f"{product.name}: has no left operand")
        values = self._builder.read_without_zero_point(product.inputs[1], 8, product).value
        left = self._builder.quantized[exponentials].value
        largest, name = self._builder.largest(context), str(context.name)
        result = symmetric(largest, 8)
        total = None
        for level, inverse in enumerate(self._inverses[exponentials]):
            stem = f"{name}{LEVEL.format(level)}"
            step = symmetric(largest * _HEADROOM * RATIO**level, 8)
            mixed = self._store(add_node(product, "MatMul", [left, values], stem), step)
            term = add_node(product, "Mul", [mixed.value, inverse.value], f"{stem}/term")
            scaled = self._store(term, result)
            if total is not None:
                term = add_node(product, "Add", [self._builder.quantized[total].value, scaled.value], f"{stem}/total")
                self._store(term, result)
            total = term
        if total is None:
            raise ValueError(f"{product.name}: no level")
        self._builder.observed[str(total.name)] = self._builder.statistics(context)
        replace_uses(context, total)

    def _inverse(self, before: ir.Node, sums: ir.Value, name: str, level: int) -> QuantizedValue:
        """Look 1/S up with Gather: 0 where S is of another level."""
        graph, stem = self._builder.graph, f"{name}{SUM}{LEVEL.format(level)}"
        divisor = add_constant(graph, f"{stem}/divisor", np.array(RATIO**level, np.int32))
        end = add_constant(graph, f"{stem}/end", np.array(LAST_INDEX + 1, np.int32))
        divided = add_node(before, "Div", [sums, divisor], f"{stem}/divided")
        index = add_node(before, "Min", [divided, end], f"{stem}/index", role=Role.SOFTMAX_INDEX)
        known = graph.initializers.get(f"inverses_{min(level, 1)}")
        table = known or add_constant(graph, f"inverses_{min(level, 1)}", table_of_inverses(level))
        found = add_node(before, "Gather", [table, index], f"{stem}/inverse", role=Role.SOFTMAX_INVERSE)
        found.dtype = ir.DataType.INT8
        params = Affine(float(np.float32(1.0 / (255 * RATIO**level))), -128, -128, 127)
        parameters = self._builder.parameters(stem, params, 8)
        real = add_node(before, "DequantizeLinear", [found, *parameters], f"{stem}/dequantized")
        return QuantizedValue(real, params, 8)

    def _store(self, value: ir.Value, params: Affine) -> QuantizedValue:
        node = value.producer()
        if node is None:
            raise ValueError(f"{value.name}: has no node")
        return self._builder.store(node, value, params, 8)
