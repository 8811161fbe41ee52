"""Choose the range of a tensor from its statistics: minmax, percentile, mse or entropy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import BINS, Histogram, Statistics
from edgeq.errors import EdgeqError
from edgeq.quantization import affine
from edgeq.records import Scheme

Measure = Callable[[Histogram, float, float, Scheme], float]

PERCENTILE = 99.999
STEPS = 96  # candidate limits, from the whole range down to an eighth of it


def choose(statistics: Statistics, scheme: Scheme) -> tuple[float, float]:
    """Give (low, high) by the scheme's method.

    Raises:
        EdgeqError: the method needs a histogram and none was kept.
    """
    low, high = float(statistics.minimum.min()), float(statistics.maximum.max())
    if scheme.range_method == "minmax":
        return low, high
    if statistics.histogram is None:
        raise EdgeqError(f"range method {scheme.range_method}: the calibration holds no histogram of this tensor")
    if scheme.range_method == "percentile":
        return percentile(statistics.histogram, low, high)
    error = _squared_error if scheme.range_method == "mse" else _divergence
    return _search(statistics.histogram, low, high, scheme, error)


def centres(histogram: Histogram) -> NDArray[np.float64]:
    """Give the middle of each bin, float64[4096]."""
    width = histogram.limit / BINS
    middles: NDArray[np.float64] = (np.arange(2 * BINS, dtype=np.float64) - BINS + 0.5) * np.float64(width)
    return middles


def percentile(histogram: Histogram, low: float, high: float, kept: float = PERCENTILE) -> tuple[float, float]:
    """Leave out the same few values at both ends."""
    cumulated = np.cumsum(histogram.counts) / histogram.counts.sum()
    values, width = centres(histogram), histogram.limit / BINS
    cut = (100.0 - kept) / 100.0
    bottom = values[int(np.searchsorted(cumulated, cut))] - width / 2
    top = values[min(int(np.searchsorted(cumulated, 1.0 - cut)), len(values) - 1)] + width / 2
    return max(low, float(bottom)), min(high, float(top))


def _search(histogram: Histogram, low: float, high: float, scheme: Scheme, measure: Measure) -> tuple[float, float]:
    """Shrink each end of the range in turn and keep the pair with the smallest error."""
    best, best_error = (low, high), measure(histogram, low, high, scheme)
    for end in (1, 0):
        start = best
        for fraction in np.linspace(1.0, 0.125, STEPS)[1:].tolist():
            bottom, top = (start[0], start[1] * fraction) if end else (start[0] * fraction, start[1])
            error = measure(histogram, bottom, top, scheme)
            if error < best_error:
                best, best_error = (bottom, top), error
    return best


def _rounded(histogram: Histogram, low: float, high: float, scheme: Scheme) -> NDArray[np.float64]:
    params = affine.asymmetric(low, high, scheme.activation_bits, scheme.activations_signed)
    return affine.dequantize(affine.quantize(centres(histogram), params), params).astype(np.float64)


def _squared_error(histogram: Histogram, low: float, high: float, scheme: Scheme) -> float:
    error = centres(histogram) - _rounded(histogram, low, high, scheme)
    return float(np.average(error**2, weights=histogram.counts))


def _divergence(histogram: Histogram, low: float, high: float, scheme: Scheme) -> float:
    """Give the Kullback-Leibler divergence of the values' distribution before and after rounding."""
    original = histogram.counts / histogram.counts.sum()
    _, group = np.unique(_rounded(histogram, low, high, scheme), return_inverse=True)
    filled = original > 0
    mass = np.bincount(group, weights=original)
    members = np.bincount(group, weights=filled.astype(np.float64))
    spread = mass[group] / np.maximum(members[group], 1.0)
    inside = filled & (spread > 0)
    return float(np.sum(original[inside] * np.log(original[inside] / spread[inside])))


# How far a masked score lies below the smallest maximum of a row, by how softmax divides.
MASKED_BELOW = {
    "normalized": 20.0,  # exp(-20) = 2e-9: what is left of a masked position
    "deferred": 12.0,  # exp(-6.3) rounds to 0: nothing at all is left, for maxima 5.7 below those observed, too
}
GELU_FLOOR = -4.0  # GELU(-4) = -1.3e-4: below, nothing is left to tell apart
