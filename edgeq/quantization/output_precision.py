"""Decide whether the embedding vectors are quantised to int8 or int16."""

from __future__ import annotations

import numpy as np

from edgeq.calibration.statistics import Statistics
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import symmetric

HEADROOM = 1.1
LOSS_MOST = 5e-4  # of the cosine between vectors without their mean
_DEVIATIONS = 6.0  # between the smallest and the largest of some hundred values


def output_params(seen: Statistics, bits: int) -> tuple[Affine, int]:
    """Give the symmetric parameters of the vectors and their bits: 16 where those wanted would lose neighbours.

    All channels share one scale. Where one channel is large in every text, as in models whose vector is one token, that
    scale is coarse for the others, and those tell texts apart.

    Args:
        seen: statistics of the vectors, per channel.
        bits: wanted.
    """
    largest = seen.largest * HEADROOM
    if rounding_loss(seen, symmetric(largest, bits).scale) > LOSS_MOST:
        bits = 16
    return symmetric(largest, bits), bits


def rounding_loss(seen: Statistics, step: float) -> float:
    """Estimate the loss of mean-centred cosine when float32 vectors are rounded to multiples of a step.

    It is half the ratio of noise to signal. The noise of rounding has a variance of step^2 / 12 in each channel.
    """
    deviations = (seen.maximum.astype(np.float64) - seen.minimum) / _DEVIATIONS
    signal = float(np.sum(deviations**2))
    return seen.maximum.size * step**2 / 12.0 / 2.0 / signal if signal else 0.0
