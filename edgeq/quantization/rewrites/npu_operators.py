"""Rewrite what some NPUs have no 16-bit operator for: BATCH_MATMUL of two tensors, GELU, and RSQRT of small values.

These rewrites also fix quantisation ranges: where a tensor is split into a branch for small values and one for large,
each saturates where the other takes over. Without those ranges, in FP32, the function is another one, and GELU is
approximated; so they stand in no tuple of rewrites that are proved, and run when the others have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import roles
from edgeq.graph.dataflow import mask_values
from edgeq.graph.edit import add_constant, add_node, constant, insert_after, made_by, readers, replace_uses, required
from edgeq.graph.roles import Role
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import HEADROOM, symmetric
from edgeq.records import IntegerSpec

CHOICE = "/choice"  # ends the names of products with zeros and ones
ROOT_HEADROOM = 4.0  # of sums of squares below the smallest observed: a text of many names has half the usual length
Fixed = dict[str, Affine]

_CODES = 2**15 - 1
_SQUARES_ERROR = 1e-3  # of the smallest sum of squares: what rounding each square may cost
_LARGE_CHANNELS = 16  # one channel in so many may have its square in two parts
_SMALLEST_RATIO = 2.0**-40  # of the smallest sum of squares to the largest
_EXACT_CODE = 512  # an interpolated root is within 0.6 % from here up
_TABLE_STEP = 128  # integers between two entries of an interpolated table
_SLOPE, _CUBIC = 2 * np.sqrt(2 / np.pi), 0.044715 * 2 * np.sqrt(2 / np.pi)  # of GELU's tanh spec: within 0.0005
_GELU_REACH = 4.0  # beyond, sigmoid has said everything
_SIGMOID_REACH = 12.0  # sigmoid(-12) = 6e-6: below, nothing is left to tell apart
_OF_ONE = Affine(1 / 32768, 0, -32768, 32767)  # the only parameters that LOGISTIC and TANH give


def npu_operators(graph: ir.Graph, statistics: Observed, spec: IntegerSpec) -> Fixed:
    """Rewrite ReduceSumSquare, MatMul and Gelu where the scheme has no operator for them in 16 bits.

    Args:
        graph: of the decomposed float model; edited in place.
        statistics: of its tensors; edited in place.
        spec: which operators there are.

    Returns:
        The scale and zero point of each tensor whose range follows from a rewrite, by name.

    Raises:
        EdgeqError: a tensor has no statistics.
    """
    rewriting = _Rewriting(graph, statistics)
    of_mask = mask_values(graph)
    for node in list(graph):
        if node.outputs[0] in of_mask:
            continue
        if node.op_type == "ReduceSumSquare" and not spec.has_16bit_matmul:
            _sum_squares(rewriting, node, spec.has_16bit_tables)
        elif node.op_type == "ReduceSumSquare" and spec.gemm_bits == 16:
            _square_twice(rewriting, node)
        elif node.op_type == "MatMul" and not spec.has_16bit_matmul and node.inputs[0] in of_mask:
            _pool(rewriting, node)
        elif node.op_type == "Gelu" and roles.has(node, Role.OUTLIER_BRANCH) and not spec.has_16bit_gelu:
            _gelu(rewriting, node)
        elif node.op_type == "Tanh" and not spec.has_16bit_tables:
            rewriting.fixed[str(node.outputs[0].name)] = _OF_ONE
    return rewriting.fixed


@dataclass
class _Rewriting:
    """Hold a graph, the statistics of its tensors, and the parameters that follow from rewrites."""

    graph: ir.Graph
    observed: Observed
    fixed: Fixed = field(default_factory=dict)

    def add(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, like: ir.Value, width: int | None = None
    ) -> ir.Value:
        """Insert a node whose output has the shape of another tensor, or one with another last axis."""
        value = add_node(before, op_type, inputs, name)
        value.dtype = ir.DataType.FLOAT
        if like.shape is not None:
            value.shape = like.shape if width is None else ir.Shape([*list(like.shape)[:-1], width])
        return value

    def constant(self, name: str, array: NDArray[Any] | list[float] | float) -> ir.Value:
        """Give a constant, the one of this name if there is one."""
        known = self.graph.initializers.get(name)
        return known if known is not None else add_constant(self.graph, name, np.asarray(array, np.float32))

    def seen(self, value: ir.Value) -> Statistics:
        """Give what was observed of a tensor, of the one that it is in another shape or tokens of, or of a table."""
        source: ir.Value | None = value
        while source is not None and str(source.name) not in self.observed:
            step = made_by(source, "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
            source = step.inputs[0] if step is not None else None
        lookup = made_by(value, "Gather") if source is None else None
        table = constant(lookup.inputs[0]) if lookup is not None else None
        if table is not None:
            return Statistics(table.min(0), table.max(0))
        if source is None:
            raise EdgeqError(f"{value.name}: the calibration has no statistics of it")
        return self.observed[str(source.name)]

    def take_place(self, node: ir.Node, result: ir.Value) -> None:
        """Let a tensor stand for a node's output, under its name, and remove the node."""
        output = node.outputs[0]
        name = str(output.name)
        replace_uses(output, result)
        output.name, result.name = f"{name}/fused", name
        self.graph.remove(node, safe=True)


def _sum_squares(rewriting: _Rewriting, node: ir.Node, has_tables: bool) -> None:
    """Replace ReduceSumSquare by Mul and a MatMul with ones; square a few large channels in two parts.

    Before::

        x ─ ReduceSumSquare

    After, where a channel is so large that its square would leave the others too few steps (t is the limit)::

        x ─ Mul(x), saturating at t² ─ MatMul(1) ──────────────────────────────── Add
        x ─ MatMul(pick) ─┬─────────── Sub ─ Mul ─ MatMul(1) ──────────────────┘
                          ├─ Clip(t) ─┘      │
                          └─ Add ────────────┘        (p - t)(p + t) = p² - t², and 0 within the limit
    """
    x, name = node.inputs[0], str(node.outputs[0].name)
    if x is None:
        return
    sums, seen = rewriting.seen(node.outputs[0]), rewriting.seen(x)
    largest, width = _largest(seen), _width(x)
    limit = _limit(largest, float(sums.minimum.min()), width)
    picked = np.flatnonzero(largest > limit) if largest.size == width else np.empty(0, np.int64)
    parts = [rewriting.add(node, "Mul", [x, x], f"{name}/each", x)]
    rewriting.fixed[f"{name}/each"] = _to((limit if picked.size else float(largest.max())) ** 2)
    if picked.size:
        parts.append(_excess(rewriting, node, x, picked, limit))
    total = _total(rewriting, node, parts, name, "")
    rewriting.observed[str(total.name)] = sums
    rewriting.take_place(node, total)
    # A sum of squares of 0, of a tensor that a token leaves empty, has no root to invert: a floor far below any step.
    least = max(float(sums.minimum.min()) / ROOT_HEADROOM, _SMALLEST_RATIO * float(sums.maximum.max()))
    step = symmetric(float(sums.maximum.max()) * HEADROOM, 16).scale
    if not has_tables and least / step < _EXACT_CODE:
        middle = max(1.0, float(np.rint(np.sqrt(least / step * _CODES) / _TABLE_STEP))) * _TABLE_STEP * step
        low = _total(rewriting, readers(total)[0], parts, str(total.name), "/low")
        rewriting.fixed |= {f"{part.name}/low{CHOICE}": _to(middle) for part in parts}
        _split_root(rewriting, total, low, middle, least)


def _square_twice(rewriting: _Rewriting, node: ir.Node) -> None:
    """Square a row in two ranges where the sums of some tokens have few steps in that of the largest.

    Before::

        x ─ ReduceSumSquare ─ Sqrt ─ Reciprocal

    After (m is the middle)::

        x ─┬─ ReduceSumSquare, up to m ─ Sqrt ─ Reciprocal ─ Sub(1/√m) ─ Add
           └─ ReduceSumSquare ─ Sqrt ─ Reciprocal, up to 1/√m ───────────┘
    """
    whole, name = node.outputs[0], str(node.outputs[0].name)
    sums = rewriting.seen(whole)
    step = symmetric(float(sums.maximum.max()) * HEADROOM, 16).scale
    least = max(float(sums.minimum.min()) / ROOT_HEADROOM, _SMALLEST_RATIO * float(sums.maximum.max()))
    if least / step >= _EXACT_CODE:
        return
    # With a power of four between the middle and the step, 1 / sqrt is the same table for many norms.
    middle = 4.0 ** max(1.0, float(np.rint(np.log2(least / step * _CODES) / 4.0))) * step
    low = rewriting.add(node, "ReduceSumSquare", list(map(required, node.inputs)), f"{name}/low", whole)
    rewriting.fixed[f"{name}/low"] = _to(middle)
    _split_root(rewriting, whole, low, middle, least)


def _limit(largest: NDArray[np.float64], smallest_sum: float, width: int) -> float:
    """Give the largest value whose square may set the step of all squares."""
    noise = np.sqrt(width / 12.0)  # of a sum of so many rounded squares, in steps
    limit = float(np.sqrt(_CODES * _SQUARES_ERROR * smallest_sum / noise))
    place = min(max(1, largest.size // _LARGE_CHANNELS), largest.size - 1)
    return max(limit, float(np.sort(largest)[::-1][place]))


def _excess(rewriting: _Rewriting, node: ir.Node, x: ir.Value, picked: NDArray[np.int64], limit: float) -> ir.Value:
    """Give by how much the squares of the picked channels pass the square of the limit."""
    name, seen, count = str(node.outputs[0].name), rewriting.seen(x), picked.size
    own = Statistics(seen.minimum[picked], seen.maximum[picked])
    matrix = np.zeros((_width(x), count), np.float32)
    matrix[picked, np.arange(count)] = 1.0
    pick = rewriting.constant(f"{name}/large/pick", matrix)
    ends = [rewriting.constant(f"{name}/large/{end}", sign * limit) for end, sign in (("low", -1.0), ("high", 1.0))]
    large = rewriting.add(node, "MatMul", [x, pick], f"{name}/large{CHOICE}", x, count)
    roles.give(required(large.producer()), Role.ZERO_ONE_PRODUCT)
    inside = rewriting.add(node, "Clip", [large, *ends], f"{name}/inside", large)
    outside = rewriting.add(node, "Sub", [large, inside], f"{name}/outside", large)
    both = rewriting.add(node, "Add", [large, inside], f"{name}/both", large)
    rewriting.observed |= {
        f"{name}/large{CHOICE}": own, f"{name}/outside": own,
        f"{name}/both": Statistics(own.minimum * 2, own.maximum * 2),
    }  # fmt: skip
    rewriting.fixed |= {f"{name}/inside": _to(limit), f"{name}/excess": _to(float(_largest(own).max()) ** 2)}
    return rewriting.add(node, "Mul", [outside, both], f"{name}/excess", large)


def _total(rewriting: _Rewriting, before: ir.Node, parts: list[ir.Value], name: str, ending: str) -> ir.Value:
    """Add up the channels of each part by a MatMul with ones, and the parts; all have the range of the whole sum."""
    total: ir.Value | None = None
    for part in parts:
        own, width = f"{part.name}{ending}{CHOICE}", _width(part)
        ones = rewriting.constant(f"ones_{width}", np.ones((width, 1)))
        added = rewriting.add(before, "MatMul", [part, ones], own, part, 1)
        roles.give(required(added.producer()), Role.ZERO_ONE_PRODUCT)
        rewriting.observed[own] = rewriting.observed[name]
        total = added if total is None else rewriting.add(before, "Add", [total, added], f"{name}{ending}/sum", added)
    if total is None:
        raise ValueError(f"{name}: has no parts")
    return total


def _split_root(rewriting: _Rewriting, total: ir.Value, low: ir.Value, middle: float, least: float) -> None:
    """Take 1/sqrt of small and of large sums with a scale each: an interpolated table is off for small integers.

    Before::

        sum ─ Sqrt ─ Reciprocal

    After (m is the middle)::

        sum, up to m ─ Sqrt ─ Reciprocal ─ Sub(1/√m) ─ Add
        sum ─ Sqrt ─ Reciprocal, up to 1/√m ───────────┘

    Whatever the sum is, one of the two is 1/√m.
    """
    name, following = str(total.name), readers(total)[0]
    floor = following.inputs[1] if following.op_type == "Add" else None
    root = readers(following.outputs[0])[0] if floor is not None else following
    inverse = readers(root.outputs[0])[0]
    if floor is not None:
        rewriting.observed[str(low.name)] = rewriting.observed[name]
        rewriting.fixed[str(low.name)] = _to(middle)
        low = rewriting.add(root, "Add", [low, floor], f"{name}/low/floored", low)
    rewriting.observed[str(low.name)] = rewriting.observed[name]
    result = inverse.outputs[0]
    stem, after = str(result.name), readers(result)[0]
    low_root = rewriting.add(inverse, "Sqrt", [low], f"{stem}/low/root", low)
    low_inverse = rewriting.add(inverse, "Reciprocal", [low_root], f"{stem}/low", low)
    at_middle = rewriting.constant(f"{stem}/middle", [middle**-0.5])
    above = rewriting.add(after, "Sub", [low_inverse, at_middle], f"{stem}/above", low)
    joined = rewriting.add(after, "Add", [above, result], f"{stem}/joined", low)
    insert_after(result, joined)
    result.name, joined.name = f"{stem}/high", stem
    rewriting.fixed |= {str(low.name): _to(middle), f"{stem}/high": _to(middle**-0.5)}
    rewriting.fixed |= {name: _to(least**-0.5) for name in (f"{stem}/low", f"{stem}/above", stem)}


def _pool(rewriting: _Rewriting, node: ir.Node) -> None:
    """Replace a pooling's MatMul by a Mul of each token with its weight, and a ReduceSum over the tokens.

    Before::

        share [batch, 1, sequence] ─ MatMul(hidden)

    After::

        share [batch, 1, sequence] ─ Transpose ─┐
        hidden ──────────────────────────────── Mul ─ Transpose ─ ReduceSum ─ Transpose
    """
    share, hidden = node.inputs
    if share is None or hidden is None:
        return
    name = str(node.outputs[0].name)
    turn = {"perm": [0, 2, 1]}
    # The weights of another choice of the token are the same.
    known = next((use for use in readers(share) if roles.has(use, Role.POOLING_WEIGHTS)), None)
    if known is None:
        column = add_node(node, "Transpose", [share], f"{name}/share", turn, role=Role.POOLING_WEIGHTS)
    else:
        column = known.outputs[0]
    each = rewriting.add(node, "Mul", [hidden, column], f"{name}/each", hidden)
    turned = add_node(node, "Transpose", [each], f"{name}/turned", turn)
    last = rewriting.graph.initializers.get("last_axis")
    axis = last if last is not None else add_constant(rewriting.graph, "last_axis", np.array([-1], np.int64))
    added = add_node(node, "ReduceSum", [turned, axis], f"{name}/tokens")
    result = add_node(node, "Transpose", [added], f"{name}/rows", turn)
    seen = rewriting.seen(node.outputs[0])
    rewriting.observed[f"{name}/each"] = rewriting.seen(hidden)
    rewriting.fixed[f"{name}/tokens"] = _to(float(_largest(seen).max()))
    result.shape, result.dtype = node.outputs[0].shape, ir.DataType.FLOAT
    rewriting.take_place(node, result)


def _gelu(rewriting: _Rewriting, node: ir.Node) -> None:
    """Replace GELU by its form with a sigmoid, which is within 0.0005 of it.

    Before::

        x ─ Gelu

    After::

        x ─┬─ Mul(√c) ─ Mul(itself) ─ Add(a) ─ Mul ─ Sigmoid ─ Mul       x * sigmoid(x (a + c x²))
           └───────────────────────────────────┴────────────────┘
    """
    x, name = node.inputs[0], str(node.outputs[0].name)
    if x is None:
        return
    bend, slope = rewriting.constant(f"{name}/bend", [_CUBIC**0.5]), rewriting.constant(f"{name}/slope", [_SLOPE])
    bent = rewriting.add(node, "Mul", [x, bend], f"{name}/bent", x)
    square = rewriting.add(node, "Mul", [bent, bent], f"{name}/square", x)
    steepness = rewriting.add(node, "Add", [square, slope], f"{name}/steepness", x)
    steep = rewriting.add(node, "Mul", [x, steepness], f"{name}/steep", x)
    opened = rewriting.add(node, "Sigmoid", [steep], f"{name}/opened", x)
    result = rewriting.add(node, "Mul", [x, opened], f"{name}/product", x)
    rewriting.fixed |= {
        f"{name}/bent": _to(_CUBIC**0.5 * _GELU_REACH), f"{name}/square": _to(_CUBIC * _GELU_REACH**2),
        f"{name}/steepness": _to(_CUBIC * _GELU_REACH**2 + _SLOPE), f"{name}/steep": _to(_SIGMOID_REACH),
        f"{name}/opened": _OF_ONE,
    }  # fmt: skip
    rewriting.take_place(node, result)


def _to(largest: float) -> Affine:
    """Give the int16 parameters that saturate at a magnitude."""
    return Affine(float(np.float32(largest / _CODES)), 0, -_CODES - 1, _CODES)


def _largest(seen: Statistics) -> NDArray[np.float64]:
    """Give the largest magnitude that each channel's int16 range holds."""
    return seen.magnitudes * HEADROOM


def _width(value: ir.Value) -> int:
    size = value.shape[-1] if value.shape is not None else None
    if not isinstance(size, int):
        raise Unsupported(
            f"{value.name}: the size of its last axis is not known, which the form for NPUs needs; "
            "use a scheme without it, such as w8a8-int"
        )
    return size
