"""Map between float32 values and integers as QuantizeLinear and DequantizeLinear do. numpy only, no I/O.

`value = (integer - zero_point) * scale`, as ONNX defines QuantizeLinear and DequantizeLinear.
Source: ONNX 1.23, docs/Operators.md, QuantizeLinear-21 (round half to even, then saturate).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Affine:
    """Hold the quantisation parameters of one tensor or channel.

    Attributes:
        scale: float32 step, over 0.
        zero_point: the integer of 0.0.
        low: smallest integer.
        high: largest integer.
    """

    scale: float
    zero_point: int
    low: int
    high: int


def integer_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Give the smallest and largest integer, e.g. (-128, 127) or (0, 255)."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def asymmetric(minimum: float, maximum: float, bits: int = 8, signed: bool = False) -> Affine:
    """Give parameters that cover [minimum, maximum] and 0.0, which an integer represents exactly.

    Args:
        minimum: smallest value.
        maximum: largest value, not below `minimum`.
        bits: 2 to 16.
        signed: whether integers go below 0.

    Raises:
        ValueError: the range is not finite, or upside down.
    """
    if not (np.isfinite(minimum) and np.isfinite(maximum) and minimum <= maximum):
        raise ValueError(f"the range [{minimum}, {maximum}] is no range")
    low, high = integer_limits(bits, signed)
    bottom, top = min(float(minimum), 0.0), max(float(maximum), 0.0)
    scale = max(float(np.float32((top - bottom) / (high - low))), SMALLEST_SCALE)
    zero_point = int(np.clip(np.rint(low - bottom / scale), low, high))
    return Affine(scale, zero_point, low, high)


def symmetric_scales(magnitudes: ArrayLike, bits: int) -> NDArray[np.float32]:
    """Give the scales of symmetric integers -(2^(bits-1) - 1) .. 2^(bits-1) - 1; the lowest one stays unused.

    Args:
        magnitudes: largest absolute value per channel.
        bits: of the integers.

    Returns:
        float32, same shape; 1.0 where a channel is all zero.
    """
    scales = np.asarray(magnitudes, np.float64) / (2 ** (bits - 1) - 1)
    return np.where(scales > SMALLEST_SCALE, scales, 1.0).astype(np.float32)


def quantize(values: ArrayLike, params: Affine) -> NDArray[np.int32]:
    """Turn float32 into int32 as QuantizeLinear does: divide, round half to even, add the zero point, saturate."""
    scaled = np.rint(np.asarray(values, np.float32) / np.float32(params.scale)).astype(np.float64)
    integers: NDArray[np.int32] = np.clip(scaled + params.zero_point, params.low, params.high).astype(np.int32)
    return integers


def dequantize(integers: ArrayLike, params: Affine) -> NDArray[np.float32]:
    """Turn integers into float32 as DequantizeLinear does."""
    return ((np.asarray(integers, np.int64) - params.zero_point) * np.float32(params.scale)).astype(np.float32)


def significant(values: NDArray[np.floating], bits: int) -> NDArray[np.float64]:
    """Round each value to so many significant bits, half to even.

    Args:
        values: any shape, finite.
        bits: of the significand, its leading one counted.

    Returns:
        float64 of the same shape.
    """
    fraction, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(np.rint(fraction * 2.0**bits) / 2.0**bits, exponent)
