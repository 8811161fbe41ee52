"""Code attention as weights that are not normalised, their product with the values, and an exact division behind it.

Eight bits hold shares of 1/256 at the finest: a long text spreads attention so thin that most shares round to 0 or one
code. exp(score - largest score of the row) fills its codes instead, whatever the length; its sum S over a row is exact,
and the product is divided by S behind::

    scores ─┬─ Sub ─ Exp ─┬─ ReduceSum ─ index ─┬─ Gather(1/S, level 0) ─ Mul ─┬─ Add ─ Add ... ─ context
            └─ ReduceMax  │                     └─ Gather(1/S, level 1) ─ Mul ─┘
                          ├─ MatMul(values), step u ─────────────────────┘  │
                          └─ MatMul(values), step 4 u ──────────────────────┘

What a product holds grows with S, and its codes have one step for all rows. So there is a product for each level of S,
[4^k, 4^(k+1)), with a step four times that of the level below. A row reads the one of its level: the tables of the
others hold 0 for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import add_constant, add_node, replace_uses
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import Coded, CodedGraph, symmetric

LEVELS = 5  # sums up to 4^5: texts of up to 1,024 tokens
RATIO = 4
WEIGHTS = Affine(float(np.float32(1 / 255)), -128, -128, 127)  # the largest of a row is 1.0 exactly
DIFFERENCES_ZERO = 127  # no score lies above the largest of its row
SUM, LARGEST, DIFFERENCE, WEIGHT, LEVEL = "/sum", "/largest", "/difference", "/weight", "/level_{}"
_UNIT = 255  # codes of a weight of 1.0
LAST_INDEX = RATIO * (_UNIT + 1) - 1  # of a level
_HEADROOM = 2.0  # a product's range over the largest context, at the lower end of its level: long rows average


def table_of_inverses(level: int) -> NDArray[np.int8]:
    """Give int8 codes of 1/S by the index of S, its codes over 4^level rounded down; 0.0 outside of the level.

    The last entry stands for all indices above.
    """
    index = np.arange(LAST_INDEX + 2, dtype=np.float64)
    middle = index + (0.5 if level else 0.0)
    codes = np.rint(255.0 * _UNIT / np.maximum(middle, _UNIT)) - 128.0  # 1/S in units of 1/255 of the level's largest
    first = _UNIT + 1 if level else _UNIT
    return np.where((index >= first) & (index <= LAST_INDEX), codes, -128.0).astype(np.int8)


class ExactShares:
    """Write attention with its division behind the product."""

    def __init__(self, codes: CodedGraph) -> None:
        """Begin with no attention seen."""
        self._codes = codes
        self._inverses: dict[ir.Value, list[Coded]] = {}  # by weights: 1/S for each level

    def takes(self, weights: ir.Value | None) -> bool:
        """Tell whether a product's left operand are weights that are not normalised."""
        return weights in self._inverses

    def weights(self, softmax: ir.Node) -> None:
        """Put weights that are not normalised, and the inverse of their sums, in the place of a softmax."""
        output = softmax.outputs[0]
        name = str(output.name)
        scores = self._codes.read(softmax.inputs[0], 8, softmax)
        axis = add_constant(self._codes.graph, f"{name}/axis", np.array([-1], np.int64))
        largest = add_node(softmax, "ReduceMax", [scores.value, axis], f"{name}{LARGEST}")
        coded = self._store(largest, scores.affine)
        difference = add_node(softmax, "Sub", [scores.value, coded.value], f"{name}{DIFFERENCE}")
        below = self._store(difference, Affine(scores.affine.scale, DIFFERENCES_ZERO, -128, 127))
        weight = self._store(add_node(softmax, "Exp", [below.value], f"{name}{WEIGHT}"), WEIGHTS)
        self._codes.coded[output] = weight
        total = add_node(softmax, "ReduceSum", [weight.value, axis], f"{name}{SUM}")
        unit = add_constant(self._codes.graph, f"{name}{SUM}/unit", np.array(_UNIT, np.float32))
        scaled = add_node(softmax, "Mul", [total, unit], f"{name}{SUM}/scaled")
        rounded = add_node(softmax, "Round", [scaled], f"{name}{SUM}/rounded")
        codes = add_node(softmax, "Cast", [rounded], f"{name}{SUM}/codes", {"to": ir.DataType.INT32.value})
        self._inverses[output] = [self._inverse(softmax, codes, name, level) for level in range(LEVELS)]

    def mix(self, product: ir.Node) -> None:
        """Put a product for each level, times one over the sum of each row, in the place of a product with weights."""
        weights, context = product.inputs[0], product.outputs[0]
        if weights is None:
            raise ValueError(f"{product.name}: has no weights")
        values = self._codes.read(product.inputs[1], 8, product).value
        left = self._codes.coded[weights].value
        largest, name = self._codes.largest(context), str(context.name)
        result = symmetric(largest, 8)
        total = None
        for level, inverse in enumerate(self._inverses[weights]):
            stem = f"{name}{LEVEL.format(level)}"
            step = symmetric(largest * _HEADROOM * RATIO**level, 8)
            mixed = self._store(add_node(product, "MatMul", [left, values], stem), step)
            term = add_node(product, "Mul", [mixed.value, inverse.value], f"{stem}/term")
            coded = self._store(term, result)
            if total is not None:
                term = add_node(product, "Add", [self._codes.coded[total].value, coded.value], f"{stem}/total")
                self._store(term, result)
            total = term
        if total is None:
            raise ValueError(f"{product.name}: no level")
        self._codes.observed[str(total.name)] = self._codes.statistics(context)
        replace_uses(context, total)

    def _inverse(self, before: ir.Node, sums: ir.Value, name: str, level: int) -> Coded:
        """Look 1/S up: 0 where S is of another level."""
        graph, stem = self._codes.graph, f"{name}{SUM}{LEVEL.format(level)}"
        divisor = add_constant(graph, f"{stem}/divisor", np.array(RATIO**level, np.int32))
        end = add_constant(graph, f"{stem}/end", np.array(LAST_INDEX + 1, np.int32))
        divided = add_node(before, "Div", [sums, divisor], f"{stem}/divided")
        index = add_node(before, "Min", [divided, end], f"{stem}/index")
        known = graph.initializers.get(f"inverses_{min(level, 1)}")
        table = known or add_constant(graph, f"inverses_{min(level, 1)}", table_of_inverses(level))
        found = add_node(before, "Gather", [table, index], f"{stem}/inverse")
        found.dtype = ir.DataType.INT8
        codes = Affine(float(np.float32(1.0 / (255 * RATIO**level))), -128, -128, 127)
        parameters = self._codes.parameters(stem, codes, 8)
        return Coded(add_node(before, "DequantizeLinear", [found, *parameters], f"{stem}/dequantized"), codes, 8)

    def _store(self, value: ir.Value, codes: Affine) -> Coded:
        node = value.producer()
        if node is None:
            raise ValueError(f"{value.name}: made by nobody")
        self._codes.store(node, value, codes, 8)
        return self._codes.coded[value]
