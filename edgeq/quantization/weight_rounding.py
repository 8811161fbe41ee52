"""Round float32 weights to int8: to nearest, or with error compensation (GPTQ) where inputs were observed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.quantization import affine

BLOCK = 64
COLUMNS = 1 << 14
DAMPING = 1e-4
BLOCK_DAMPING = 1e-2  # of 4-bit weights, whose errors are large beside what a short calibration knows of the moment
_SHARES = np.linspace(1.0, 0.7, 13)  # of a block's range
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
    scales = np.broadcast_to(own_scales.astype(np.float64), weight.shape)
    zero = np.zeros((1, 1))
    damping = step * step / 12.0 + DAMPING * float(np.diag(moment).astype(np.float64).mean())
    values = _rounded(weight, moment, damping, scales, np.broadcast_to(zero, weight.shape), (-limit, limit))
    return values.astype(np.int8), own_scales


def _rounded(
    weight: NDArray[np.float32],
    moment: NDArray[np.float32],
    damping: float,
    scales: NDArray[np.float64],
    zero_points: NDArray[np.float64],
    limits: tuple[int, int],
) -> NDArray[np.int16]:
    """Round weights to codes, each with a scale and a zero point, and let what is still to come make up for the error.

    Args:
        weight: float32[channels, out].
        moment: float32[channels, channels], mean of x xᵀ.
        damping: added to the moment's diagonal.
        scales: float64[channels, out].
        zero_points: float64[channels, out].
        limits: the smallest and the largest code.

    Returns:
        Codes, int16[channels, out].
    """
    hessian = moment.astype(np.float64)
    diagonal = np.diag(hessian).copy()
    hessian[np.diag_indices_from(hessian)] += max(damping, _SMALLEST_DAMPING)
    order = np.argsort(-diagonal, kind="stable")
    factor = _factor(hessian, order)
    del hessian
    factor /= np.diag(factor)[:, None].copy()
    codes = np.empty(weight.shape, np.int16)
    lost = np.empty(weight.shape)  # float64[channels, out], in order: what rounding took from each channel so far
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        wanted = weight[order[start:stop]].astype(np.float64)
        wanted += factor[start:stop, :start] @ lost[:start]
        for row in range(start, stop):
            place, channel = row - start, order[row]
            code = np.clip(np.rint(wanted[place] / scales[channel]) + zero_points[channel], *limits)
            codes[channel] = code
            np.subtract(weight[channel], (code - zero_points[channel]) * scales[channel], out=lost[row])
            wanted[place + 1 :] += factor[row + 1 : stop, row, None] * lost[row]
    return codes


def blocked(weight: NDArray[np.float32], seen: Statistics | None, bits: int, block: int) -> BlockCodes:
    """Round a MatMul's weight to unsigned integers with a scale and a zero point for each block of input channels.

    The range of a block is the share of its own from 70 to 100 % whose rounding errors are the least. Then GPTQ rounds,
    where the second moment of the input was observed.

    Args:
        weight: float32[channels, out].
        seen: statistics of the input, if there are any.
        bits: of the integers, at most 8.
        block: input channels that share a scale; the last block may have fewer.

    Source: Frantar et al. 2023, GPTQ; the choice of ranges as in AWQ's clipping (Lin et al. 2024), by the weight's own
        error.
    """
    found = block_parameters(weight, bits, block)
    wide_scales, wide_points = (
        np.repeat(part.astype(np.float64), block, axis=0)[: len(weight)] for part in (found.scales, found.zero_points)
    )
    if seen is None or seen.moment is None:
        return found
    damping = BLOCK_DAMPING * float(np.diag(seen.moment).astype(np.float64).mean())
    codes = _rounded(weight, seen.moment, damping, wide_scales, wide_points, (0, 2**bits - 1))
    return BlockCodes(codes.astype(np.uint8), found.scales, found.zero_points)


class BlockCodes(NamedTuple):
    """Hold codes uint8[channels, out] with scales float32[blocks, out] and zero points uint8[blocks, out]."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    def real(self, block: int) -> NDArray[np.float32]:
        """Give what the codes stand for, float32[channels, out]."""
        rows = len(self.codes)
        scales = np.repeat(self.scales, block, axis=0)[:rows]
        points = np.repeat(self.zero_points, block, axis=0)[:rows]
        real: NDArray[np.float32] = (self.codes.astype(np.float32) - points.astype(np.float32)) * scales
        return real


def block_parameters(weight: NDArray[np.float32], bits: int, block: int) -> BlockCodes:
    """Choose the ranges of blocks of input channels, and round to nearest."""
    channels, outputs = weight.shape
    blocks = -(-channels // block)
    padded = np.zeros((blocks * block, outputs))
    padded[:channels] = weight
    parts = padded.reshape(blocks, block, outputs)
    low, high = np.minimum(parts.min(axis=1), 0.0), np.maximum(parts.max(axis=1), 0.0)
    top = 2**bits - 1
    best = np.full((blocks, outputs), np.inf)
    scales, points = np.ones((blocks, outputs), np.float32), np.zeros((blocks, outputs), np.uint8)
    codes = np.zeros(parts.shape, np.uint8)
    for share in _SHARES:
        scale = np.maximum((high - low) * share / top, affine.SMALLEST_SCALE).astype(np.float32)
        point = np.clip(np.rint(-low * share / scale), 0, top)
        code = np.clip(np.rint(parts / scale[:, None]) + point[:, None], 0, top)
        error = (((code - point[:, None]) * scale[:, None] - parts) ** 2).sum(axis=1)
        better = error < best
        best = np.where(better, error, best)
        scales, points = np.where(better, scale, scales), np.where(better, point, points).astype(np.uint8)
        codes = np.where(better[:, None], code, codes).astype(np.uint8)
    return BlockCodes(codes.reshape(-1, outputs)[:channels], scales, points)


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
