"""Hold the statistics of one float32 tensor: minimum, maximum, histogram, mean and second moment, per channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BINS = 2048
LEAST_OF_MEDIAN = 1e-3  # an inactive channel counts as this part of the median channel
LEAST_MEDIAN = 1e-6  # where most channels are inactive
LEAST_LARGEST = 1e-9


@dataclass
class Histogram:
    """Count values in 2 x 2048 bins over [-limit, limit]; the limit doubles, merging bins, when values pass it."""

    limit: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))

    def add(self, values: NDArray[np.float32], magnitude: float) -> None:
        """Count float32 values of any shape, whose largest magnitude is given."""
        if self.limit == 0.0:
            self.limit = 2.0 ** np.ceil(np.log2(max(magnitude, 1e-30)))
        while magnitude > self.limit:
            middle = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([np.zeros(BINS // 2, np.int64), middle, np.zeros(BINS // 2, np.int64)])
            self.limit *= 2.0
        bins = (values.reshape(-1) * np.float32(BINS / self.limit) + np.float32(BINS)).astype(np.int32)
        np.minimum(bins, 2 * BINS - 1, out=bins)
        self.counts += np.bincount(bins, minlength=2 * BINS)


@dataclass
class Statistics:
    """Hold the statistics of one tensor.

    Attributes:
        minimum: float32[channels], smallest value per channel (`edgeq.graph.channel_axis`); float32[1], of the whole
            tensor, where it cannot be told which axis holds them.
        maximum: float32[channels], largest value per channel.
        histogram: of all values, when asked for.
        mean: float32[channels], mean over tokens, when asked for; with a moment, over the same tokens.
        moment: float32[channels, channels], mean of x xᵀ over tokens, when asked for.
        seen: tokens so far.
        rows: tokens that entered the moment, evenly spread over those seen.
        waiting: rows that have not entered it yet.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    histogram: Histogram | None = None
    moment: NDArray[np.float32] | None = None
    mean: NDArray[np.float32] | None = None
    seen: int = 0
    rows: int = 0
    waiting: list[NDArray[np.float32]] = field(default_factory=list, repr=False)

    @property
    def magnitudes(self) -> NDArray[np.float64]:
        """Give the largest absolute value per channel, float64[channels]."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum)).astype(np.float64)

    @property
    def active_magnitudes(self) -> NDArray[np.float64]:
        """Give `magnitudes`, each at least a thousandth of the median: what divides by them needs no number near 0."""
        magnitudes = self.magnitudes
        return np.maximum(magnitudes, LEAST_OF_MEDIAN * max(float(np.median(magnitudes)), LEAST_MEDIAN))

    @property
    def largest(self) -> float:
        """Give the largest absolute value of all channels, at least 1e-9, so that a scale can be made of it."""
        return max(-float(self.minimum.min()), float(self.maximum.max()), LEAST_LARGEST)


Observed = dict[str, Statistics]
