"""Map between real values and integer codes: scale, zero point, rounding, saturation. numpy only, no I/O.

`real = (code - zero_point) * scale`, as ONNX defines QuantizeLinear and DequantizeLinear.
Source: ONNX 1.23, docs/Operators.md, QuantizeLinear-21 (round half to even, then saturate).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Affine:
    """Hold the parameters of one tensor or channel.

    Attributes:
        scale: float32 step, over 0.
        zero_point: the code of 0.0.
        low: smallest code.
        high: largest code.
    """

    scale: float
    zero_point: int
    low: int
    high: int


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Give the smallest and largest code, e.g. (-128, 127) or (0, 255)."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def asymmetric(minimum: float, maximum: float, bits: int = 8, signed: bool = False) -> Affine:
    """Cover [minimum, maximum], widened to hold 0.0, so that 0.0 has a code of its own.

    Args:
        minimum: smallest value.
        maximum: largest value, not below `minimum`.
        bits: 2 to 16.
        signed: codes below 0.

    Raises:
        ValueError: the range is not finite, or upside down.
    """
    if not (np.isfinite(minimum) and np.isfinite(maximum) and minimum <= maximum):
        raise ValueError(f"the range [{minimum}, {maximum}] is no range")
    low, high = code_limits(bits, signed)
    bottom, top = min(float(minimum), 0.0), max(float(maximum), 0.0)
    scale = max(float(np.float32((top - bottom) / (high - low))), SMALLEST_SCALE)
    zero_point = int(np.clip(np.rint(low - bottom / scale), low, high))
    return Affine(scale, zero_point, low, high)


def symmetric_scales(magnitudes: ArrayLike, bits: int) -> NDArray[np.float32]:
    """Give the scales of symmetric codes -(2^(bits-1) - 1) .. 2^(bits-1) - 1; the lowest code stays unused.

    Args:
        magnitudes: largest absolute value per channel.
        bits: of the codes.

    Returns:
        float32, same shape; 1.0 where a channel is all zero.
    """
    scales = np.asarray(magnitudes, np.float64) / (2 ** (bits - 1) - 1)
    return np.where(scales > SMALLEST_SCALE, scales, 1.0).astype(np.float32)


def quantize(values: ArrayLike, affine: Affine) -> NDArray[np.int32]:
    """Give int32 codes: divide, round half to even, add the zero point, saturate. float32 arithmetic."""
    scaled = np.rint(np.asarray(values, np.float32) / np.float32(affine.scale))
    codes: NDArray[np.int32] = np.clip(scaled.astype(np.float64) + affine.zero_point, affine.low, affine.high).astype(
        np.int32
    )
    return codes


def dequantize(codes: ArrayLike, affine: Affine) -> NDArray[np.float32]:
    """Give float32 values of codes."""
    return ((np.asarray(codes, np.int64) - affine.zero_point) * np.float32(affine.scale)).astype(np.float32)


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
