"""Choose which neurons of a feed-forward block share a range, by the error of their 8-bit codes in its output."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics

WIDTH = 16  # neurons in a group come in multiples of this: integer kernels work on such blocks
LARGEST_SHARE = 0.5  # of the neurons that the group with the wider range may take
LEAST = 1e-4  # of the output's variance that a further group has to take away to be worth its products


def groups(statistics: Statistics, weight: NDArray[np.float32], bits: int = 8) -> list[NDArray[np.int64]]:
    """Choose which neurons get a group with a range of its own: as many groups as take away enough predicted error.

    Every group costs two products, an activation and an Add, however few neurons it has. So the error is held against
    the product's output, not against the error of one group: a group has to take away LEAST of the output's variance.

    Args:
        statistics: of the tensor that the product reads.
        weight: float32[neurons, out].
        bits: of the codes.

    Returns:
        The neurons of each further group, in ascending order, the widest range first; none where one group serves.
    """
    cuts = _cuts(statistics, weight)
    signal = _variance(statistics, weight) * 12.0 * (2**bits - 1) ** 2
    if cuts is None or signal <= 0.0:
        return []
    found: tuple[int, ...] = ()
    least = cuts.error(())
    for candidate in (cuts.best_pair(), cuts.best_triple()):
        if least - cuts.error(candidate) >= LEAST * (len(candidate) - len(found)) * signal:
            found, least = candidate, cuts.error(candidate)
    ends = (0, *found)
    return [np.sort(cuts.order[start:stop]) for start, stop in itertools.pairwise(ends)]


@dataclass(frozen=True)
class _Cuts:
    """Hold neurons from the widest range to the narrowest, and what predicts the error of groups of neighbours.

    Attributes:
        order: the neurons, int64[neurons].
        low, high: the ends of their ranges in this order, float64[neurons].
        before: the squared norms of the rows of the weight in front of each neuron, float64[neurons + 1].
    """

    order: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    before: NDArray[np.float64]

    def error(self, cuts: tuple[int, ...]) -> float:
        """Give the squared range times the squared norms of the rows, summed over the groups between the cuts."""
        ends = (0, *cuts, len(self.order))
        return sum(self._of(start, stop) for start, stop in itertools.pairwise(ends))

    def _of(self, start: int, stop: int) -> float:
        width = self.high[start:stop].max() - self.low[start:stop].min()
        return float(width**2 * (self.before[stop] - self.before[start]))

    def best_pair(self) -> tuple[int, ...]:
        """Give the cut into two groups with the least error."""
        return min(((cut,) for cut in self._places()), key=self.error)

    def best_triple(self) -> tuple[int, ...]:
        """Give the cuts into three groups with the least error."""
        places = self._places()
        pairs = itertools.combinations(places, 2) if len(places) > 1 else iter([self.best_pair()])
        return min(pairs, key=self.error)

    def _places(self) -> list[int]:
        """Give where a cut may lie: after 16, 32, ... neurons, further apart the more there are in front."""
        found, place = [], WIDTH
        while place <= int(LARGEST_SHARE * len(self.order)):
            found.append(place)
            place += max(WIDTH, place // 4 // WIDTH * WIDTH)
        return found


def _cuts(statistics: Statistics, weight: NDArray[np.float32]) -> _Cuts | None:
    """Sort the neurons by range; None where there are too few for two groups."""
    low, high = np.minimum(statistics.minimum, 0.0), np.maximum(statistics.maximum, 0.0)
    order = np.argsort(-(high - low), kind="stable")
    if len(order) * LARGEST_SHARE < WIDTH:
        return None
    norms = (weight[order].astype(np.float64) ** 2).sum(axis=1)
    before = np.concatenate([[0.0], np.cumsum(norms)])
    return _Cuts(order, low[order].astype(np.float64), high[order].astype(np.float64), before)


def _variance(statistics: Statistics, weight: NDArray[np.float32]) -> float:
    """Give the variance of a product's output, summed over its channels; 0 where no second moment was observed."""
    if statistics.moment is None or statistics.mean is None:
        return 0.0
    wide = weight.astype(np.float64)
    mean = statistics.mean.astype(np.float64) @ wide
    return float(((statistics.moment.astype(np.float64) @ wide) * wide).sum() - (mean**2).sum())
