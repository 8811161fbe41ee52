"""Choose which neurons of a feed-forward block share a range, by the error of their 8-bit codes in its output."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics

WIDTH = 16  # neurons in a group come in multiples of this: integer kernels work on such blocks
LARGEST_SHARE = 0.5  # of the neurons that the group with the wider range may take


def output_errors(statistics: Statistics, weight: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Predict the error of a product's output for each way to cut its neurons into two groups by range.

    Rounding to a step s adds s**2 / 12 times the squared norm of its row of the weight for each neuron. Ranges hold
    zero, as those of codes do.

    Args:
        statistics: of the tensor that the product reads.
        weight: float32[neurons, out].

    Returns:
        The neurons from the widest range to the narrowest, int64[neurons], and the error with the first n of them in a
        group of their own, float64[neurons], relative to one group for all; the first entry is 1.
    """
    low, high = np.minimum(statistics.minimum, 0.0), np.maximum(statistics.maximum, 0.0)
    order = np.argsort(-(high - low), kind="stable")
    low, high = low[order].astype(np.float64), high[order].astype(np.float64)
    norms = (weight[order].astype(np.float64) ** 2).sum(axis=1)
    whole = high.max() - low.min()
    rest_low, rest_high = (np.minimum.accumulate(low[::-1])[::-1], np.maximum.accumulate(high[::-1])[::-1])
    before = np.concatenate([[0.0], np.cumsum(norms)[:-1]])
    errors = before * whole**2 + (norms.sum() - before) * (rest_high - rest_low) ** 2
    return order, errors / errors[0]


def widest(statistics: Statistics, weight: NDArray[np.float32], gain: float) -> NDArray[np.int64] | None:
    """Choose the neurons for a group with a range of its own.

    Args:
        statistics: of the tensor that the product reads.
        weight: float32[neurons, out].
        gain: by how much the predicted error has to fall for a second group to pay.

    Returns:
        The neurons of the group, in ascending order; None where one group serves.
    """
    order, errors = output_errors(statistics, weight)
    counts = np.arange(WIDTH, int(LARGEST_SHARE * len(order)) + 1, WIDTH)
    if not len(counts):
        return None
    count = int(counts[np.argmin(errors[counts])])
    return np.sort(order[:count]) if errors[count] * gain <= 1.0 else None
