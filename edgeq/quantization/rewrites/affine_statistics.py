"""Derive the statistics of a tensor that a rewrite scales and shifts by channel from those observed before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics


def affine(seen: Statistics, factor: NDArray[np.floating] | float, shift: NDArray[np.floating] | float) -> Statistics:
    """Give the statistics of `factor * x + shift`, both per channel: all of them follow exactly."""
    ends = seen.minimum * factor + shift, seen.maximum * factor + shift
    low, high = np.minimum(*ends).astype(np.float32), np.maximum(*ends).astype(np.float32)
    mean = None if seen.mean is None else np.asarray(seen.mean * factor, np.float64)
    moment = None
    if seen.moment is not None and mean is not None:
        factors, shifts = np.broadcast_to(factor, mean.shape), np.broadcast_to(shift, mean.shape)
        moment = seen.moment * np.outer(factors, factors) + np.outer(mean, shifts) + np.outer(shifts, mean + shifts)
        moment = moment.astype(np.float32)
    return Statistics(low, high, None, moment, None if mean is None else (mean + shift).astype(np.float32))
