"""Each kernel that lowering emits, alone in a file, over all its codes: what every kernel set gives.

The reference decodes the operands' codes, computes in float64, divides by the result's scale, rounds to the nearest
code and saturates. A case allows 1 code of difference, for a fixed-point multiplier and ties, unless it says why it
allows something else; kernels that only move codes must be exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import erf
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.errors import LoweringFailed

pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
import kernel_sets
from ai_edge_litert import schema_py_generated as schema
from kernel_sets import Running, kernel

from edgeq.backends.tflite.kernels import KERNELS, LITERT, read, violations
from edgeq.backends.tflite.writer import DTYPES, ModelWriter, QuantParams

pytestmark = pytest.mark.tflite

Array = NDArray[Any]


@dataclass(frozen=True)
class Operand:
    """QuantParams and what they mean; without parameters they are plain numbers."""

    codes: Array
    parameters: QuantParams | None = None
    is_constant: bool = False

    def real(self) -> NDArray[np.float64]:
        return decoded(self.codes, self.parameters)


@dataclass(frozen=True)
class Case:
    """One operator, its operands, its exact result, and how many codes the kernel may be away from that."""

    name: str
    builtin: str
    version: int
    operands: Sequence[Operand]
    exact: NDArray[np.float64]
    dtype: str
    parameters: QuantParams | None = None
    options: tuple[str, dict[str, Any]] | None = None
    tolerance: int | Array = 1

    def __str__(self) -> str:
        data = [operand for operand in self.operands if operand.parameters or not operand.is_constant]
        dtypes = dict.fromkeys([*(str(operand.codes.dtype) for operand in data), self.dtype])
        return "-".join([self.builtin, *dtypes, *([self.name] if self.name else [])])

    def expected(self) -> NDArray[np.int64]:
        scale, zero_point = scale_and_zero_point(self.parameters, self.exact.ndim)
        limits = np.iinfo(self.dtype)
        return np.clip(np.rint(self.exact / scale + zero_point), limits.min, limits.max).astype(np.int64)

    def differences(self, codes: Array) -> NDArray[np.int64]:
        """Count the codes between a result and the expected one."""
        return np.abs(codes.astype(np.int64) - self.expected())

    def to_bytes(self) -> bytes:
        writer = ModelWriter("one operator")
        graph = writer.subgraph("only")
        tensors = []
        for number, operand in enumerate(self.operands):
            name, codes = f"operand_{number}", operand.codes
            if operand.is_constant:
                tensors.append(graph.constant(name, codes, operand.parameters))
            else:
                tensors.append(graph.tensor(name, codes.shape, str(codes.dtype), operand.parameters))
                graph._inputs[name] = tensors[-1]  # `input` gives none any parameters: edgeq's own have no need of them
        result = graph.tensor("result", self.exact.shape, self.dtype, self.parameters)
        graph.operator(getattr(schema.BuiltinOperator, self.builtin), self.version, tensors, result, self._options())
        graph.output("result", result)
        return writer.to_bytes()

    def _options(self) -> tuple[int, Any] | None:
        if self.options is None:
            return None
        name, values = self.options
        table = getattr(schema, f"{name}T")()
        vars(table).update(values)
        return getattr(schema.BuiltinOptions, name), table


def scale_and_zero_point(parameters: QuantParams | None, rank: int) -> tuple[Array, Array]:
    """Give what a file stores (32-bit scales), in the shape that broadcasts against a tensor."""
    if parameters is None:
        return np.array(1.0), np.array(0.0)
    shape = [-1 if axis == parameters.axis else 1 for axis in range(rank)]
    scale = np.array(parameters.scales, np.float32).astype(np.float64).reshape(shape)
    return scale, np.array(parameters.zero_points, np.float64).reshape(shape)


def decoded(codes: Array, parameters: QuantParams | None) -> NDArray[np.float64]:
    scale, zero_point = scale_and_zero_point(parameters, codes.ndim)
    return (codes - zero_point) * scale


# --- the codes --------------------------------------------------------------------------------------------------------

ALL = {dtype: np.arange(np.iinfo(dtype).min, np.iinfo(dtype).max + 1).astype(dtype) for dtype in ("int8", "int16")}
GRID = {  # both codes of a pair: all, or every 131st, the extremes, and those around zero
    "int8": ALL["int8"],
    "int16": np.unique([*ALL["int16"][::131], -32767, *range(-3, 4), 32766, 32767]).astype(np.int16),
}
RANDOM = np.random.default_rng(5)


def shuffled(dtype: str, *shape: int) -> Array:
    """Give all codes in no order, again and again until the shape is full."""
    rounds = -(-int(np.prod(shape)) // ALL[dtype].size)
    codes = np.concatenate([RANDOM.permutation(ALL[dtype]) for _ in range(rounds)])
    return codes[: int(np.prod(shape))].reshape(shape)


def ordered(dtype: str, *shape: int) -> Array:
    """Give the codes of `shuffled` from the smallest up, so that rows differ as much as they can."""
    return np.sort(shuffled(dtype, *shape), axis=None).reshape(shape)


def of(dtype: str, scale: float, zero_point: int) -> QuantParams:
    """Give 16-bit codes no zero point, and a scale for the same range: 256 times as fine."""
    return QuantParams.of(scale, zero_point) if dtype == "int8" else QuantParams.of(scale / 256.0)


# --- the cases --------------------------------------------------------------------------------------------------------


def elementwise() -> Iterator[Case]:
    """Give sums, differences and products of all pairs, the right operand whole or repeated along an axis."""
    kinds: dict[str, tuple[Callable[[Array, Array], Array], dict[str, Any], float]] = {
        "ADD": (np.add, {"potScaleInt16": False}, 0.11),
        "SUB": (np.subtract, {"potScaleInt16": False}, 0.11),
        "MUL": (np.multiply, {}, 0.45),
    }
    for (builtin, (function, options, scale)), dtype in product(kinds.items(), GRID):
        left, right = of(dtype, 0.07, -11), of(dtype, 0.05, 23)
        column, row = GRID[dtype][:, None], GRID[dtype][None, :]
        first, second = np.meshgrid(GRID[dtype], GRID[dtype], indexing="ij")
        pairs = {
            "side by side": (Operand(first, left), Operand(second, right)),
            "a column": (Operand(second, left), Operand(column, right)),
            "a row": (Operand(first, left), Operand(row, right)),
            "a stored row": (Operand(first, left), Operand(row[0], right, is_constant=True)),
        }
        for name, (one, other) in pairs.items():
            exact = function(one.real(), other.real())
            kind = f"{builtin.title()}Options"
            yield Case(name, builtin, 2, (one, other), exact, dtype, of(dtype, scale, 5), (kind, options))
    for dtype, codes in GRID.items():
        same, options = of(dtype, 0.07, -11), ("MaximumMinimumOptions", {})  # it compares codes, whatever they mean
        first, second = np.meshgrid(codes, codes, indexing="ij")
        for name, other in (("side by side", Operand(second, same)), ("a column", Operand(codes[::-1, None], same))):
            one = Operand(first, same)
            exact = np.minimum(one.real(), other.real())
            yield Case(name, "MINIMUM", 2, (one, other), exact, dtype, same, options, tolerance=0)
    number = Operand(ALL["int16"].astype(np.int32)[None])
    offset = Operand(np.array([2589], np.int32), is_constant=True)
    exact = number.real() + offset.real()
    yield Case("index", "ADD", 1, (number, offset), exact, "int32", None, ("AddOptions", {}), tolerance=0)


def whole_numbers() -> Iterator[Case]:
    """Give 32-bit integers, which must be exact: products of all pairs of 16-bit codes, sums and shifts up to 2^31."""
    grid = GRID["int16"].astype(np.int32)
    first, second = np.meshgrid(grid, grid, indexing="ij")
    large = RANDOM.integers(-(2**30), 2**30, (512, 384)).astype(np.int32)
    large[0, :4] = (-(2**30), 2**30 - 1, -1, 1)
    functions: dict[str, tuple[Callable[[Array, Array], Array], str, Array, Array]] = {
        "ADD": (np.add, "AddOptions", large, large[::-1]),
        "SUB": (np.subtract, "SubOptions", large, large[::-1]),
        "MUL": (np.multiply, "MulOptions", first, second),
        "MAXIMUM": (np.maximum, "MaximumMinimumOptions", large, large[::-1]),
        "MINIMUM": (np.minimum, "MaximumMinimumOptions", large, large[::-1]),
    }
    for builtin, (function, options, left, right) in functions.items():
        shapes = {
            "side by side": Operand(right),
            "a column": Operand(right[:, :1]),
            "a stored row": Operand(right[0], is_constant=True),
            "a stored number": Operand(right[:1, 0], is_constant=True),
        }
        for name, other in shapes.items():
            one = Operand(left)
            exact = function(one.real(), other.real())
            yield Case(f"whole, {name}", builtin, 1, (one, other), exact, "int32", None, (options, {}), tolerance=0)
    for bits in (1, 7, 16):
        count = Operand(np.array([bits], np.int32), is_constant=True)
        exact = np.floor(large.astype(np.float64) / 2.0**bits)
        operands, options = (Operand(large), count), ("RightShiftOptions", {})
        yield Case(f"by {bits}", "RIGHT_SHIFT", 1, operands, exact, "int32", None, options, tolerance=0)
    for number in (-32768, 127):
        sizes = Operand(np.array([1, 16, 24], np.int32), is_constant=True)
        value = Operand(np.array(number, np.int32), is_constant=True)
        exact, options = np.full(sizes.codes, float(number)), ("FillOptions", {})
        yield Case(str(number), "FILL", 1, (sizes, value), exact, "int32", None, options, tolerance=0)


def products() -> Iterator[Case]:
    """Give products of tensors: of all pairs (inner length 1), of rows, and each row's with itself."""
    for dtype, version in (("int8", 2), ("int16", 3)):
        left, right, scores = of(dtype, 0.07, -11), of(dtype, 0.05, 0), of(dtype, 0.6, 5)
        wide = of(dtype, 3.0, 5)
        shares = QuantParams.of(1 / 256, -128) if dtype == "int8" else QuantParams.of(1 / 32768)
        column = Operand(GRID[dtype][None, :, None], left)
        heads = Operand(shuffled(dtype, 1, 3, 40, 32), left)
        others = Operand(shuffled(dtype, 1, 3, 24, 32), right)
        weights = Operand(shuffled(dtype, 1, 3, 40, 24), shares)
        cases = [
            ("all pairs", column, Operand(column.codes, right), True, scores),
            ("scores", heads, others, True, wide),
            ("context", weights, others, False, of(dtype, 0.15, 0)),
        ]
        if dtype == "int16":
            rows = Operand(ordered(dtype, 1, 2048, 1, 32), left)
            cases.append(("squares", rows, rows, True, QuantParams.of(0.08)))
        if dtype == "int8":  # with 32 bits it reads no zero point
            plain, ones = Operand(weights.codes, QuantParams.of(1.0)), np.ones((1, 1, 1, 24), np.int8)
            exact = plain.real().sum(axis=-1, keepdims=True)
            operands, options = (plain, Operand(ones, QuantParams.of(1.0), is_constant=True)), {"adjY": True}
            table = ("BatchMatMulOptions", options)
            yield Case("sums", "BATCH_MATMUL", 2, operands, exact, "int32", QuantParams.of(1.0), table, tolerance=0)
        for name, one, other, is_adjoint, parameters in cases:
            exact = one.real() @ (other.real().swapaxes(-1, -2) if is_adjoint else other.real())
            options = ("BatchMatMulOptions", {"adjY": is_adjoint})
            yield Case(name, "BATCH_MATMUL", version, (one, other), exact, dtype, parameters, options)


def linear() -> Iterator[Case]:
    """Give weight products with a scale per channel: of all pairs (inner length 1), and of rows."""
    options = ("FullyConnectedOptions", {"keepNumDims": True})
    shapes = {"all pairs": (ALL["int8"][1:, None], 0.05), "rows": (RANDOM.integers(-127, 128, (48, 64)), 0.005)}
    for (name, (weight, size)), (dtype, version) in product(shapes.items(), (("int8", 5), ("int16", 4))):
        channels, width = weight.shape
        scales = size * (1.0 + np.arange(channels) / channels)
        source = of(dtype, 0.07, -11)
        codes = GRID[dtype] if width == 1 else shuffled(dtype, 65536)
        operands = [
            Operand(codes.reshape(1, -1, width), source),
            Operand(weight.astype(np.int8), QuantParams(tuple(scales), (0,) * channels), is_constant=True),
        ]
        product_ = operands[0].real() @ operands[1].real().T
        for bias_dtype in ("int32", "int64", None) if dtype == "int16" else ("int32", None):
            exact, bias, stated = product_, [], options
            if bias_dtype is not None:
                steps = QuantParams(tuple(scales * source.scales[0]), (0,) * channels)
                reals = RANDOM.uniform(-3.0, 3.0, channels)
                stored = np.rint(reals / np.array(steps.scales)).astype(bias_dtype)
                bias = [Operand(stored, steps, is_constant=True)]
                exact = product_ + bias[0].real()
                if dtype == "int16":
                    stated = (options[0], {**options[1], "quantizedBiasType": DTYPES[bias_dtype]})
            yield Case(
                f"{name}, {bias_dtype} bias", "FULLY_CONNECTED", 11 if stated is not options else version,
                [*operands, *bias], exact, dtype, of(dtype, 0.4, 5), stated,
            )  # fmt: skip


def row_products() -> Iterator[Case]:
    """Give products of each channel with its own number, as a convolution over one place at a time."""
    x = Operand(shuffled("int16", 1, 1, 1024, 64), QuantParams.of(0.07 / 256.0))
    signs = np.where(RANDOM.random(64) < 0.5, -127, 127).astype(np.int8).reshape(1, 1, 1, 64)
    scales = tuple(RANDOM.uniform(0.1, 3.0, 64) / 127.0)
    row = Operand(signs, QuantParams(scales, (0,) * 64, axis=3), is_constant=True)
    values = {"padding": schema.Padding.VALID, "strideW": 1, "strideH": 1, "depthMultiplier": 1}
    options = ("DepthwiseConv2DOptions", values)
    params = QuantParams.of(0.2 / 256.0)
    yield Case("", "DEPTHWISE_CONV_2D", 5, [x, row], x.real() * row.real(), "int16", params, options)


def interpolated(case: Case) -> Case:
    """Allow a 16-bit function what its kernel strays: 2 codes more than straight lines between every 128th code do.

    A line strays far where the function bends or saturates within 128 codes. The kernel moves each of the 128th codes
    to share that error with the line before it, so the larger of two neighbours is allowed.
    """
    step, x, nearest = 128, case.operands[0].codes.reshape(-1), case.expected().reshape(-1)
    line = np.interp(x, [*x[::step], 2**15], [*nearest[::step], nearest[-1]])
    stray = np.abs(line - nearest).reshape(-1, step).max(axis=1)
    allowed = np.ceil(2 + np.maximum(stray, [*stray[1:], 0])).repeat(step)
    return replace(case, tolerance=allowed.reshape(case.exact.shape))


def functions() -> Iterator[Case]:
    """Give functions of one tensor, over all its codes."""
    for dtype in ALL:
        x, result = Operand(ALL[dtype][None], of(dtype, 0.04, 9)), of(dtype, 0.018, -120)
        gelus = {
            "erf": x.real() * (1.0 + np.vectorize(erf)(x.real() / np.sqrt(2.0))) / 2.0,
            "tanh": x.real() * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x.real() + 0.044715 * x.real() ** 3))) / 2.0,
        }
        for name, exact in gelus.items():
            options = ("GeluOptions", {"approximate": name == "tanh"})
            case = Case(name, "GELU", 2, [x], exact, dtype, result, options)
            yield case if dtype == "int8" else interpolated(case)
        yield Case("", "RELU", 2, [x], np.maximum(x.real(), 0.0), dtype, result)

        x = Operand(ordered(dtype, 4096, 4, 4), of(dtype, 0.04, 9))
        exact, over = x.real().max(axis=1), Operand(np.array([1], np.int32), is_constant=True)
        options: tuple[str, dict[str, Any]] = ("ReducerOptions", {"keepDims": False})
        version = 2 if dtype == "int8" else 3
        yield Case("", "REDUCE_MAX", version, [x, over], exact, dtype, x.parameters, options, tolerance=0)

        if dtype == "int16":
            x = Operand(ALL[dtype][None], QuantParams.of(12.0 / 32767.0))
            one = QuantParams.of(1 / 32768)
            yield interpolated(Case("", "LOGISTIC", 3, [x], 1.0 / (1.0 + np.exp(-x.real())), dtype, one))
            yield interpolated(Case("", "TANH", 3, [x], np.tanh(x.real()), dtype, one))

        x = Operand(ordered(dtype, 1, 4096, 16), of(dtype, 0.04, 9))
        exact, axis = x.real().mean(axis=2, keepdims=True), Operand(np.array([2], np.int32), is_constant=True)
        options = ("ReducerOptions", {"keepDims": True})
        yield Case("", "MEAN", 2, [x, axis], exact, dtype, of(dtype, 0.03, -20), options)


def weights() -> Iterator[Case]:
    """Give what attention's weights are made of: the largest of a row, the distance from it, exp."""
    scores = Operand(shuffled("int8", 1, 12, 64, 128), QuantParams.of(0.05, 3))
    axis, options = Operand(np.array([3], np.int32), is_constant=True), ("ReducerOptions", {"keepDims": True})
    largest = scores.real().max(axis=-1, keepdims=True)
    parameters = scores.parameters
    yield Case("", "REDUCE_MAX", 2, [scores, axis], largest, "int8", parameters, options, tolerance=0)
    whole = Operand(scores.codes.astype(np.int32) * 1_001)
    exact = whole.codes.max(axis=-1, keepdims=True).astype(np.float64)
    yield Case("", "REDUCE_MAX", 2, [whole, axis], exact, "int32", None, options, tolerance=0)
    column = Operand(scores.codes.max(axis=-1, keepdims=True), parameters)
    below, options = QuantParams.of(0.05, 127), ("SubOptions", {"potScaleInt16": False})
    exact = scores.real() - largest
    yield Case("from the largest", "SUB", 2, [scores, column], exact, "int8", below, options, tolerance=0)
    for scale in (0.01, 0.05, 0.2):
        x = Operand(ALL["int8"][None], QuantParams.of(scale, 127))
        params = QuantParams.of(1 / 255, -128)
        yield Case(str(scale), "EXP", 2, [x], np.exp(x.real()), "int8", params, ("ExpOptions", {}))


def softmaxes() -> Iterator[Case]:
    """Give shares of a row, with the scales that the kernel takes: of all pairs, and of rows near and far apart.

    The 16-bit kernel may be 2 codes away: it interpolates exp and 1 / x. It also takes exp(-10), up to 2 codes, for
    anything smaller, so each of a row's members may add that to the sum by which the others are divided.
    """
    pairs = {dtype: np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1) for dtype, grid in GRID.items()}
    for dtype, version, shares in (("int8", 2, QuantParams.of(1 / 256, -128)), ("int16", 3, QuantParams.of(1 / 32768))):
        near, far = shuffled(dtype, 1, 12, 1024, 8), shuffled(dtype, 1, 12, 64, 128)
        for name, codes, scale in (("all pairs", pairs[dtype], 0.04), ("near", near, 0.02), ("far", far, 0.5)):
            x = Operand(codes, of(dtype, scale, 9))
            powers = np.exp(x.real() - x.real().max(axis=-1, keepdims=True))
            exact = powers / powers.sum(axis=-1, keepdims=True)
            case = Case(name, "SOFTMAX", version, [x], exact, dtype, shares, ("SoftmaxOptions", {"beta": 1.0}))
            if dtype == "int16":
                case = replace(case, tolerance=2 + case.expected() * 2 * (codes.shape[-1] - 1) / 32768)
            yield case


def inverse_roots() -> Iterator[Case]:
    """Give 1 / sqrt(x) over all codes from 0 up.

    Interpolated, it is within 1.1 % from code 259 up, but 3.6 times too large at codes below 128 that do not saturate.
    """
    x = Operand(ALL["int16"][None, 2**15 :], QuantParams.of(0.002))
    with np.errstate(divide="ignore"):
        exact = 1.0 / np.sqrt(x.real())
    for name, first in (("no code saturates", 1), ("codes below 259 saturate", 259)):
        case = interpolated(Case(name, "RSQRT", 1, [x], exact, "int16", QuantParams.of(exact[0, first] / 32767.0)))
        limit = np.where(x.codes < 259, np.inf, 1 + 0.011 * case.expected())
        yield replace(case, tolerance=np.minimum(case.tolerance, limit))


def moves() -> Iterator[Case]:
    """Give what changes codes only, or where they stand."""
    either = {dtype: of(dtype, 0.04, 9) for dtype in ALL}
    for source, result in product(ALL, ALL):
        x = Operand(ALL[source][None], either[source])
        parameters = of(result, 0.031, -20)
        yield Case("", "QUANTIZE", 1, [x], x.real(), result, parameters, ("QuantizeOptions", {}))

    for dtype, parameters in either.items():
        flat, wide = Operand(ALL[dtype], parameters, True), Operand(shuffled(dtype, 1, 64, 8, 128), parameters)
        everywhere = Operand(RANDOM.permutation(flat.codes.size).astype(np.int32)[None])
        table = Operand(wide.codes.reshape(-1, 32), parameters, True)
        rows = Operand(RANDOM.integers(0, len(table.codes), (1, 128)).astype(np.int32))
        for name, stored, index in (("numbers", flat, everywhere), ("rows", table, rows)):
            exact = stored.real()[index.codes]
            options = ("GatherOptions", {})
            yield Case(name, "GATHER", 2, [stored, index], exact, dtype, parameters, options, tolerance=0)
        shape = Operand(np.array([1, 64, 1024], np.int32), is_constant=True)
        options = ("ReshapeOptions", {"newShape": shape.codes})
        exact = wide.real().reshape(shape.codes)
        yield Case("", "RESHAPE", 1, [wide, shape], exact, dtype, parameters, options, tolerance=0)
        for perm in ((0, 2, 1, 3), (0, 2, 3, 1)):
            order = Operand(np.array(perm, np.int32), is_constant=True)
            exact, options = wide.real().transpose(perm), ("TransposeOptions", {})
            yield Case(str(perm), "TRANSPOSE", 2, [wide, order], exact, dtype, parameters, options, tolerance=0)
        texts = Operand(shuffled(dtype, 1, 128, 512), parameters)
        bounds = [Operand(np.array(numbers, np.int32), is_constant=True) for numbers in ([0, 0, 0], [1, 1, 512])]
        exact, options = texts.real()[:, :1], ("SliceOptions", {})
        yield Case("", "SLICE", 4, [texts, *bounds], exact, dtype, parameters, options, tolerance=0)

    symmetric = QuantParams.of(0.04)
    casts: list[tuple[Operand, str, QuantParams | None]] = [
        (Operand(ALL["int8"].astype(np.int32)[None]), "int8", QuantParams.of(70.0, 1)),  # bits of the mask are codes
        (Operand(ALL["int16"].astype(np.int32)[None]), "int16", symmetric),
        (Operand(ALL["int8"][None], symmetric), "int16", symmetric),
        (Operand(ALL["int8"][None], symmetric), "int32", None),
        (Operand(ALL["int16"][None], symmetric), "int32", None),
    ]
    for x, dtype, parameters in casts:
        options = ("CastOptions", {"inDataType": DTYPES[str(x.codes.dtype)], "outDataType": DTYPES[dtype]})
        exact = decoded(x.codes, parameters)  # a cast keeps codes, whatever they mean
        yield Case("", "CAST", 1, [x], exact, dtype, parameters, options, tolerance=0)

    for name, least, limit in (("mask", 0, 2), ("large", -(2**23), 2**23)):
        x = Operand(RANDOM.integers(least, limit, (9, 128)).astype(np.int32))
        axis, options = Operand(np.array([1], np.int32), is_constant=True), ("ReducerOptions", {"keepDims": False})
        yield Case(name, "SUM", 1, [x, axis], x.real().sum(axis=1), "int32", None, options, tolerance=0)


def windows(maps: NDArray[np.float64], size: int, step: int, hole: int) -> NDArray[np.float64]:
    """Cut maps [1, rows, columns, channels] into windows [1, rows, columns, height, width, channels]."""
    span = (size - 1) * hole + 1
    cut = np.lib.stride_tricks.sliding_window_view(maps, (span, span), axis=(1, 2))
    return cut[:, ::step, ::step, :, ::hole, ::hole].transpose(0, 1, 2, 4, 5, 3)


def on_maps() -> Iterator[Case]:
    """Give what works on maps of an image: convolutions, plain, with strides, with holes, of each channel; pooling."""
    valid, same = schema.Padding.VALID, schema.Padding.SAME
    for dtype in ALL:
        source = of(dtype, 0.07, -11)
        x = Operand(shuffled(dtype, 1, 17, 21, 8), source)
        bias_dtype = "int64" if dtype == "int16" else "int32"
        for name, size, step, hole, padding in (
            ("plain", 3, 1, 1, valid), ("pointwise", 1, 1, 1, valid), ("strides", 3, 2, 1, valid),
            ("holes", 3, 1, 2, valid), ("same", 3, 2, 1, same), ("patches", 4, 4, 1, valid),
        ):  # fmt: skip
            real = x.real()
            if padding == same:  # zeros: one row before and behind 17 rows, one column before and behind 21
                real = np.pad(real, ((0, 0), (1, 1), (1, 1), (0, 0)))
            cut = windows(real, size, step, hole)
            strides = {"padding": padding, "strideW": step, "strideH": step}
            holes = {"dilationWFactor": hole, "dilationHFactor": hole}
            for is_depthwise in (False, True):
                channels = 8 if is_depthwise else 24
                scales = tuple(0.004 * (1.0 + np.arange(channels) / channels))
                shape = (1, size, size, channels) if is_depthwise else (channels, size, size, 8)
                axis = 3 if is_depthwise else 0
                weight = Operand(
                    RANDOM.integers(-127, 128, shape).astype(np.int8),
                    QuantParams(scales, (0,) * channels, axis), is_constant=True,
                )  # fmt: skip
                steps = QuantParams(tuple(np.array(scales) * source.scales[0]), (0,) * channels)
                stored = np.rint(RANDOM.uniform(-3.0, 3.0, channels) / np.array(steps.scales)).astype(bias_dtype)
                bias = Operand(stored, steps, is_constant=True)
                formula = "brcijk,ijk->brck" if is_depthwise else "brcijk,oijk->brco"
                kernel_ = weight.real()[0] if is_depthwise else weight.real()
                exact = np.einsum(formula, cut, kernel_) + bias.real()
                builtin, kind, version = "CONV_2D", "Conv2DOptions", {"int8": 3, "int16": 4}[dtype]
                values = {**strides, **holes}
                if is_depthwise:
                    builtin, kind, version = (
                        "DEPTHWISE_CONV_2D",
                        "DepthwiseConv2DOptions",
                        {"int8": 3, "int16": 5}[dtype],
                    )
                    values["depthMultiplier"] = 1
                result = of(dtype, 0.05 if is_depthwise and size == 1 else 0.4, 5)
                yield Case(name, builtin, version, [x, weight, bias], exact, dtype, result, (kind, values))
        cut = windows(x.real(), 3, 2, 1)
        table = {"padding": valid, "strideW": 2, "strideH": 2, "filterWidth": 3, "filterHeight": 3}
        version = 2 if dtype == "int8" else 3
        for builtin, exact, most in (
            ("MAX_POOL_2D", cut.max(axis=(3, 4)), 0), ("AVERAGE_POOL_2D", cut.mean(axis=(3, 4)), 1),
        ):  # fmt: skip
            options: tuple[str, dict[str, Any]] = ("Pool2DOptions", table)
            yield Case("", builtin, version, [x], exact, dtype, source, options, tolerance=most)
        axes, options = Operand(np.array([1, 2], np.int32), is_constant=True), ("ReducerOptions", {"keepDims": False})
        slope = Operand(np.ascontiguousarray(ordered(dtype, 1, 8, 17, 21).transpose(0, 2, 3, 1)), source)
        exact = slope.real().mean(axis=(1, 2))
        yield Case("of places", "MEAN", 2, [slope, axes], exact, dtype, of(dtype, 0.03, -20), options)
        around = np.array([[0, 0], [1, 2], [2, 0], [0, 0]], np.int32)
        pads, version = Operand(around, is_constant=True), 2 if dtype == "int8" else 4
        exact = np.pad(x.real(), around)
        yield Case("", "PAD", version, [x, pads], exact, dtype, source, ("PadOptions", {}), tolerance=0)
        lowest = Operand(np.array([ALL[dtype][0]], dtype), source, is_constant=True)
        exact = np.pad(x.real(), around, constant_values=lowest.real()[0])
        options = ("PadV2Options", {})
        yield Case("", "PADV2", version, [x, pads, lowest], exact, dtype, source, options, tolerance=0)
        other = Operand(shuffled(dtype, 1, 17, 21, 3), source)
        exact, options = np.concatenate([x.real(), other.real()], axis=3), ("ConcatenationOptions", {"axis": 3})
        version = 2 if dtype == "int8" else 3
        yield Case("", "CONCATENATION", version, [x, other], exact, dtype, source, options, tolerance=0)
    pixels = Operand(np.arange(256, dtype=np.uint8)[None], QuantParams.of(1.0))
    shifted_, options = QuantParams.of(1.0, -128), ("QuantizeOptions", {})
    yield Case("pixels", "QUANTIZE", 1, [pixels], pixels.real(), "int8", shifted_, options, tolerance=0)


CASES = [
    *elementwise(), *whole_numbers(), *products(), *linear(), *row_products(), *functions(), *weights(), *softmaxes(),
    *inverse_roots(), *moves(), *on_maps(),
]  # fmt: skip
BY_NAME = {str(case): case for case in CASES}


def narrowed_or_widened(name: str, scale: float) -> Case:
    """Give a case whose result has the other number of bits than its first operand."""
    case = BY_NAME[name]
    dtype = "int16" if case.dtype == "int8" else "int8"
    return replace(case, name="", dtype=dtype, parameters=of(dtype, scale, 5))


SILENTLY_WRONG = [
    narrowed_or_widened("FULLY_CONNECTED-int8-int32-rows, int32 bias", 0.4),
    narrowed_or_widened("FULLY_CONNECTED-int16-int8-int32-rows, int32 bias", 0.4),
    narrowed_or_widened("BATCH_MATMUL-int8-scores", 3.0),
    narrowed_or_widened("MUL-int16-side by side", 0.02),  # right by chance near 0.45: the kernel reads no scale
]


def unstated(name: str) -> Case:
    """Give a 16-bit product whose options do not state its bias's dtype, as files before version 11 have it."""
    case = BY_NAME[name]
    return replace(case, name="an unstated bias", version=4, options=("FullyConnectedOptions", {"keepNumDims": True}))


def shifted(name: str, place: int) -> Case:
    """Give an 8-bit product of two tensors, one of which has a zero point."""
    case = BY_NAME[name]
    operands = list(case.operands)
    old = operands[place].parameters
    assert old is not None
    operands[place] = replace(operands[place], parameters=QuantParams.of(old.scales[0], 23))
    exact = operands[0].real() @ operands[1].real().swapaxes(-1, -2)
    return replace(case, name=f"a zero point of operand {place}", operands=operands, exact=exact)


OLD = {"tflite-runtime", "tflite-runtime-builtin", "tflite-runtime-reference"}
# What the file leaves open, and the kernel sets that read it otherwise than it is meant.
LEFT_OPEN = [
    (
        unstated("FULLY_CONNECTED-int16-int8-int32-rows, int32 bias"),
        {"litert-reference", "tensorflow-reference", "tflite-runtime-reference"},
    ),
    (
        unstated("FULLY_CONNECTED-int16-int8-int64-rows, int64 bias"),
        OLD,
    ),
    (shifted("BATCH_MATMUL-int8-scores", 1), {"tensorflow"}),
    (
        shifted("BATCH_MATMUL-int8-int32-sums", 0),
        set(kernel_sets.BY_NAME) - {"tflite-runtime", "tflite-runtime-builtin"},
    ),
]


@pytest.fixture(scope="module", params=kernel_sets.parameters())
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = Running(request.param, tmp_path_factory.mktemp("kernels"))
    yield found
    found.close()


@pytest.fixture(scope="module", params=["litert", "litert-builtin", "litert-reference"])
def litert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = Running(kernel_sets.BY_NAME[request.param], tmp_path_factory.mktemp("kernels"))
    yield found
    found.close()


def run(case: Case, running: Running) -> Array | None:
    given = {f"operand_{i}": each.codes for i, each in enumerate(case.operands) if not each.is_constant}
    codes = running.run(case.to_bytes(), given)
    wanted = "int32" if running.kernels.takes_32_bits_only else case.dtype
    assert codes is None or (codes.dtype == wanted and codes.shape == case.exact.shape)
    return codes


def excess(case: Case, codes: Array | None) -> NDArray[np.float64]:
    """Give by how many codes a result is farther away than allowed; a kernel that dies is as wrong as can be."""
    if codes is None:
        return np.full(case.exact.shape, np.inf)
    return np.asarray(case.differences(codes) - case.tolerance, np.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_gives_the_nearest_code(case: Case, running: Running) -> None:
    (operator,) = read(case.to_bytes()).operators
    if kernel(operator) in running.kernels.lacks:
        with pytest.raises(LoweringFailed):  # else it has this kernel now: take it from the list
            run(case, running)
        return
    beyond = excess(case, run(case, running))
    if kernel(operator) in running.kernels.gets_wrong:
        assert np.mean(beyond > 0) > 0.5, "it is right now: take it from the list"
        return
    assert np.all(beyond <= 0), f"{np.sum(beyond > 0)} of {beyond.size} codes are up to {beyond.max():g} too far away"


@pytest.mark.parametrize(
    ("case", "misreading"), LEFT_OPEN, ids=lambda item: str(item) if isinstance(item, Case) else ""
)
def test_what_kernels_read_differently_is_refused(case: Case, misreading: set[str], running: Running) -> None:
    data = case.to_bytes()
    assert violations(read(data), "litert")
    (operator,) = read(data).operators
    if kernel(operator) in running.kernels.lacks:
        return
    beyond = excess(case, run(case, running))
    if running.kernels.name in misreading:
        assert np.mean(beyond > 0) > 0.5, "it reads this now as it is meant: take it from the list"
    else:
        assert np.all(beyond <= 0), f"{np.sum(beyond > 0)} of {beyond.size} codes are too far away"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_wrong_result_would_be_noticed(case: Case) -> None:
    right, limits = case.expected(), np.iinfo(case.dtype)
    zero_point = case.parameters.zero_points[0] if case.parameters else 0
    wrong = {
        "a scale": np.clip(np.rint((right - zero_point) * 1.03 + zero_point), limits.min, limits.max),
        "the sign": np.clip(2 * zero_point - right, limits.min, limits.max),
        "the place": np.roll(right, 1),
        "a constant": np.full_like(right, np.median(right)),
    }
    if case.builtin == "FILL":  # one number has no places, and is constant
        del wrong["the place"], wrong["a constant"]
    assert not [what for what, codes in wrong.items() if np.all(case.differences(codes) <= case.tolerance)]


@pytest.mark.parametrize("case", SILENTLY_WRONG, ids=str)
def test_what_is_silently_wrong_is_refused(case: Case, litert: Running) -> None:
    kernel = f"{case.builtin} version {case.version} from {case.operands[0].codes.dtype} .*to {case.dtype}"
    for runtime in KERNELS:
        (violation,) = violations(read(case.to_bytes()), runtime)
        assert re.search(f"^only: result: {kernel} is not known to be right in {runtime}$", violation)
    codes = run(case, litert)
    assert codes is not None
    differences = case.differences(codes)
    assert np.mean(differences > 10) > 0.5, f"{differences.max()} codes away at most"


def test_the_table_holds_what_was_shown_to_be_right_and_nothing_else() -> None:
    shown = {(each.name, each.version, each.dtypes) for case in CASES for each in read(case.to_bytes()).operators}
    held = {
        (name, version, dtypes)
        for name, versions in LITERT.items()
        for version, kinds in versions.items()
        for dtypes in kinds
    }
    assert held == shown


@pytest.mark.parametrize("runtime", KERNELS)
def test_another_version_is_refused(runtime: str) -> None:
    for case in CASES:
        assert "version 9 from" in violations(read(replace(case, version=9).to_bytes()), runtime)[0]


def test_a_float_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, "float32", schema.TensorType.FLOAT32)
    case = replace(BY_NAME["RELU-int8"], dtype="float32", parameters=None)
    for runtime in KERNELS:
        assert violations(read(case.to_bytes()), runtime)[0] == "only: result (float32): a float tensor"


def test_tflite_runtime_is_refused_what_it_lacks_or_gets_wrong() -> None:
    refused = {str(case) for case in CASES if violations(read(case.to_bytes()), "tflite-runtime")}
    lacking = {
        str(case) for case in CASES for each in read(case.to_bytes()).operators
        if kernel(each) in kernel_sets.BY_NAME["tflite-runtime"].lacks
    }  # fmt: skip
    assert refused == lacking
    narrow, wide = (case for case, _ in LEFT_OPEN[:2])
    assert violations(read(narrow.to_bytes()), "tflite-runtime") == []
    assert violations(read(wide.to_bytes()), "tflite-runtime")
