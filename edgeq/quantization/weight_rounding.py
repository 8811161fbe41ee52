"""Round float32 weights to int8: to nearest, or with error compensation (GPTQ) where inputs were observed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.quantization import affine

BLOCK = 64
COLUMNS = 1 << 14
DAMPING = 1e-4
_SMALLEST_DAMPING = 1e-30  # of a tensor that is 0 on every sample, whose moment has no inverse


def nearest(weight: NDArray[np.float32], bits: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each float32 weight to the nearest int8 multiple of its output channel's scale.

    Args:
        weight: float32[channels, out].
        bits: of the integers, at most 8.

    Returns:
        Integers int8[channels, out] and scales float32[out].
    """
    scales = affine.symmetric_scales(np.maximum(weight.max(axis=0), -weight.min(axis=0)), bits)
    limit = 2 ** (bits - 1) - 1
    values = np.empty(weight.shape, np.int8)
    for start in range(0, weight.shape[1], COLUMNS):  # a table of tokens has gigabytes: no copy of it as a whole
        part = slice(start, start + COLUMNS)
        values[:, part] = np.clip(np.rint(weight[:, part] / scales[part]), -limit, limit)
    return values, scales


def compensated(
    weight: NDArray[np.float32], moment: NDArray[np.float32], step: float, bits: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round float32 weights to int8 by GPTQ: the input channels still to come make up for each one's error.

    Minimises E‖x W - x̂ Ŵ‖² for the observed second moment of x, where x̂ is x rounded to `step`: the rounding adds
    step²/12 to the diagonal of the moment. Channels with the largest moment are rounded first.

    Args:
        weight: float32[channels, out].
        moment: float32[channels, channels], mean of x xᵀ.
        step: the scale of x.
        bits: of the integers, at most 8.

    Returns:
        Integers int8[channels, out] and scales float32[out].

    Source: Frantar et al. 2023, GPTQ, algorithm 1.
    """
    own_scales = nearest(weight, bits)[1]
    limit = 2 ** (bits - 1) - 1
    hessian = moment.astype(np.float64)
    diagonal = np.diag(hessian).copy()
    damping = max(step * step / 12.0 + DAMPING * float(diagonal.mean()), _SMALLEST_DAMPING)
    hessian[np.diag_indices_from(hessian)] += damping
    order = np.argsort(-diagonal, kind="stable")
    factor = _factor(hessian, order)
    del hessian
    factor /= np.diag(factor)[:, None].copy()
    scales = own_scales.astype(np.float64)
    values = np.empty(weight.shape, np.int8)
    lost = np.empty(weight.shape)  # float64[channels, out], in order: what rounding took from each channel so far
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        wanted = weight[order[start:stop]].astype(np.float64)
        wanted += factor[start:stop, :start] @ lost[:start]
        for row in range(start, stop):
            place = row - start
            rounded = np.clip(np.rint(wanted[place] / scales), -limit, limit)
            values[order[row]] = rounded
            np.subtract(weight[order[row]], rounded * scales, out=lost[row])
            wanted[place + 1 :] += factor[row + 1 : stop, row, None] * lost[row]
    return values, own_scales


def _factor(hessian: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give the lower triangular L with Lᵀ L = H, float64[channels, channels], of a matrix H taken in this order.

    GPTQ's errors are those of Babai's nearest plane in the lattice of L: channel i is rounded to what makes row i of
    L (w - q) smallest, given the channels before. So one Cholesky factor serves, and no inverse: a seventh of the work.

    Source: Chen et al. 2025, The geometry of LLM quantization: GPTQ as Babai's nearest plane algorithm.
    """
    back = order[::-1]
    lower = np.linalg.cholesky(hessian[np.ix_(back, back)])
    return np.ascontiguousarray(lower[::-1, ::-1].T, np.float64)


def rounded(
    weight: NDArray[np.float32], seen: Statistics | None, step: float, bits: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a MatMul's weight with compensation where the second moment of its input was observed, else to nearest.

    Args:
        weight: float32[channels, out].
        seen: statistics of the input, if there are any.
        step: the scale of the input.
        bits: of the integers, at most 8.

    Returns:
        Integers int8[channels, out] and scales float32[out].
    """
    if seen is None or seen.moment is None:
        return nearest(weight, bits)
    return compensated(weight, seen.moment, step, bits)


def lost_mean(
    weight: NDArray[np.float32], values: NDArray[np.int8], scales: NDArray[np.float32], seen: Statistics | None
) -> NDArray[np.float64]:
    """Give by how much rounding a weight shifts the mean of a product, float64[out]: it is added to the bias.

    0 where no mean of the input was observed.
    """
    if seen is None or seen.mean is None:
        return np.zeros(len(scales))
    lost: NDArray[np.float64] = seen.mean.astype(np.float64) @ (weight - values * scales.astype(np.float64))
    return lost
