"""Choose by how much each channel of a tensor is scaled before 8-bit products read it, by their predicted error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.records import Scheme

EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of a channel's range: how much of it moves into weights
LEAST_RANGE = 0.1  # of the median: a channel that hardly moves on the calibration texts may move on others
COMPENSATED = 0.5  # of the error of weights rounded to nearest is left when they are rounded with compensation (GPTQ)
_DEVIATIONS = 6.0  # between the middle of a channel's range and its end, where no second moment was observed

Vector = NDArray[np.float64]


def centred(
    seen: Statistics, weights: Sequence[NDArray[np.float32]], scheme: Scheme, has_shift: bool
) -> tuple[Vector, Vector]:
    """Choose factors for asymmetric codes, and what is subtracted behind them to centre each channel.

    Args:
        seen: of the tensor; ranges, and second moments where they were observed.
        weights: float32[channels, out] of each product that reads it.
        scheme: the bits of tensors and weights.
        has_shift: whether channels may be centred; without, what is subtracted is 0.

    Returns:
        The factors, a power of the channels' ranges, and the shifts, float64[channels] each.
    """
    low, high = seen.minimum.astype(np.float64), seen.maximum.astype(np.float64)
    middle = (low + high) / 2.0 if has_shift else np.zeros(len(low))
    factor = _best(low - middle, high - middle, seen, weights, scheme)
    return factor, middle * factor


def symmetric(seen: Statistics, weights: Sequence[NDArray[np.float32]], scheme: Scheme) -> Vector:
    """Choose factors for codes without a zero point; arguments as those of `centred`."""
    reach = seen.magnitudes
    return _best(-reach, reach, seen, weights, scheme)


def _best(
    low: Vector, high: Vector, seen: Statistics, weights: Sequence[NDArray[np.float32]], scheme: Scheme
) -> Vector:
    """Choose the factors whose codes are predicted to give the least error at the products."""
    reach = np.maximum(high, -low)
    reach = np.maximum(reach, LEAST_RANGE * max(float(np.median(reach)), 1e-9))
    even = np.exp(np.mean(np.log(reach)))
    choices = [(even / reach) ** exponent for exponent in EXPONENTS]
    square = _squares(seen, reach)
    stacked = np.concatenate(weights, axis=1).astype(np.float64)
    errors = [_error(low, high, square, stacked, factor, scheme) for factor in choices]
    best: Vector = choices[int(np.argmin(errors))]
    return best


def _squares(seen: Statistics, reach: Vector) -> Vector:
    """Give each channel's variance, float64[channels]."""
    if seen.moment is None or seen.mean is None:
        return (reach / _DEVIATIONS) ** 2
    return np.maximum(np.diag(seen.moment).astype(np.float64) - seen.mean.astype(np.float64) ** 2, 0.0)


def _error(low: Vector, high: Vector, square: Vector, weight: Vector, factor: Vector, scheme: Scheme) -> float:
    """Predict the squared error at the products' outputs, of the tensor's codes and of the weights' together.

    Rounding to a step s has a variance of s^2 / 12 in each channel, which its row of the weight passes on.
    """
    scaled = weight / factor[:, None]
    step = ((high * factor).max() - (low * factor).min()) / (2**scheme.activation_bits - 1)
    steps = np.abs(scaled).max(axis=0) / (2 ** (scheme.weight_bits - 1) - 1)
    of_weights = COMPENSATED * float((steps**2).sum()) * float((square * factor**2).sum())
    return float(step**2 * (scaled**2).sum() + of_weights)
