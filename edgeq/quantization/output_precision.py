"""Decide how many bits the codes of the vectors have."""

from __future__ import annotations

import numpy as np

from edgeq.calibration.statistics import Statistics
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import symmetric

HEADROOM = 1.1
WIDE = 16
LOSS_MOST = 5e-4  # of the cosine between vectors without their mean
_DEVIATIONS = 6.0  # between the smallest and the largest of some hundred values


def vector_codes(seen: Statistics, bits: int) -> tuple[Affine, int]:
    """Give the codes of the vectors, with 16 bits where those wanted would lose neighbours.

    One step serves all channels. Where one channel is large in every text, as in models whose vector is one token, the
    step that it needs is coarse for the others, and those tell texts apart.

    Args:
        seen: statistics of the vectors, per channel.
        bits: wanted.
    """
    largest = seen.largest * HEADROOM
    if rounding_loss(seen, symmetric(largest, bits).scale) > LOSS_MOST:
        bits = WIDE
    return symmetric(largest, bits), bits


def rounding_loss(seen: Statistics, step: float) -> float:
    """Estimate what cosine is lost between vectors without their mean, and those rounded to a step.

    A cosine loses half of noise over signal. The noise of rounding has a variance of step^2 / 12 in each channel.
    """
    deviations = (seen.maximum.astype(np.float64) - seen.minimum) / _DEVIATIONS
    signal = float(np.sum(deviations**2))
    return seen.maximum.size * step**2 / 12.0 / 2.0 / signal if signal else 0.0
