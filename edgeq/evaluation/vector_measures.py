"""Measure vectors against FP32's in numpy: mean-centred cosine, regret@10, Spearman, norms, and bootstrap intervals.

Plain cosine sees nothing where all vectors point one way, and the overlap of the ten nearest counts swaps between
equals; both are measured, to be shown. What is judged is the cosine of vectors less FP32's mean, and regret@10: the
FP32 similarity that is lost by taking the artifact's ten nearest instead of FP32's.

The intervals are percentile intervals of the bootstrap (B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap,
chapter 13): the texts are resampled as queries, and the neighbours of each come from the whole set.

This file needs numpy alone, and Python 3.8: `tools/device_script` copies what follows the imports into the device
script, which has a `unit` of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.data.sessions import unit

NEIGHBOURS = 10
_UNIT_TOLERANCE = 1e-4
_LEAST_SPREAD = 1e-6  # of unit vectors around their mean: float32 resolves no less
_BLOCK_ROWS = 512
_RANKED_TEXTS = 3000  # 4.5 million pairs; more take gigabytes and do not change the correlation
_RESAMPLES, _BLOCK_RESAMPLES, _SEED = 1000, 100, 0
_QUANTILES = (0.025, 0.975)  # of a 95 % interval


def measured(reference: NDArray[np.float32], vectors: NDArray[np.float32]) -> dict[str, float]:
    """Measure float32[texts, dim] against FP32's vectors of the same texts.

    Both sides need the same shape, finite numbers, at least three texts, and no zero vector in FP32's.

    Returns:
        The figures of `edgeq.records.Measures` that follow from the vectors alone.
    """
    norms, own = (np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (reference, vectors))
    expected, found = unit(reference), unit(vectors)
    cosines = np.clip(np.sum(expected * found, axis=1), -1.0, 1.0)
    centred = centred_cosines(reference, vectors)
    regrets, shared = ranking_losses(expected, found)
    cosine_mean, cosine_low, cosine_high = mean_interval(centred)
    regret_mean, regret_low, regret_high = mean_interval(regrets)
    return {
        "centred_cosine_mean": cosine_mean,
        "centred_cosine_mean_low": cosine_low,
        "centred_cosine_mean_high": cosine_high,
        "centred_cosine_p01": float(np.sort(centred)[(len(centred) - 1) // 100]),
        "centred_cosine_min": float(centred.min()),
        "regret_mean": regret_mean,
        "regret_mean_low": regret_low,
        "regret_mean_high": regret_high,
        "regret_p99": float(np.sort(regrets)[-1 - (len(regrets) - 1) // 100]),
        "spearman": similarity_correlation(expected, found),
        "norm_error_max": float(np.abs(own / norms - 1.0).max()),
        "is_normalized": bool(np.abs(norms - 1.0).max() < _UNIT_TOLERANCE),
        "max_abs_error": float(np.abs(reference.astype(np.float64) - vectors).max()),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "top10_overlap": float(shared.mean()),
    }


def centred_cosines(reference: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Give each text's cosine with FP32, both vectors scaled to length 1 and less the mean of FP32's, float64[texts].

    The mean of FP32's is taken from both sides, so an offset that all the vectors have in common counts, too.
    """
    expected, found = unit(reference), unit(vectors)
    mean = expected.mean(axis=0)
    cosines: NDArray[np.float64] = np.clip(np.sum(unit(expected - mean) * unit(found - mean), axis=1), -1.0, 1.0)
    return cosines


def is_constant(reference: NDArray[np.float32]) -> bool:
    """Tell whether all vectors of float32[texts, dim] have one direction, so that centring leaves nothing."""
    rows = unit(reference)
    return bool(np.linalg.norm(rows - rows.mean(axis=0), axis=1).max() < _LEAST_SPREAD)


def ranking_losses(
    expected: NDArray[np.float64], found: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give regret@10 and the ratio of shared neighbours of each text, float64[texts] both.

    The regret of a text is (sum of FP32's similarities to FP32's ten nearest - to the artifact's ten nearest) /
    (sum to FP32's ten - 10 * FP32's mean similarity to all others): 0 where nothing is lost, 1 where ten drawn at
    random would do as well. Where all others are as similar, no choice loses anything. Sets of up to eleven texts take
    all the others.

    Args:
        expected: float64[texts, dim], FP32's unit vectors.
        found: float64[texts, dim], the artifact's.
    """
    count = len(expected)
    nearest = min(NEIGHBOURS, count - 1)
    regrets, shared = np.empty(count), np.empty(count)
    for start in range(0, count, _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        similarities, theirs = expected[rows] @ expected.T, found[rows] @ found.T
        here = np.arange(len(similarities))
        mean = (similarities.sum(axis=1) - similarities[here, start + here]) / (count - 1)
        similarities[here, start + here] = theirs[here, start + here] = -np.inf
        best, chosen = (np.argpartition(-each, nearest - 1, axis=1)[:, :nearest] for each in (similarities, theirs))
        most, taken = (np.take_along_axis(similarities, each, axis=1).sum(axis=1) for each in (best, chosen))
        possible = most - nearest * mean
        lost = np.maximum(most - taken, 0.0)
        regrets[rows] = np.where(lost > 0.0, lost / np.maximum(possible, np.finfo(np.float64).tiny), 0.0)
        shared[rows] = shared_neighbours(best, chosen)
    return regrets, shared


def shared_neighbours(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give the ratio of entries that each row of two int64[rows, k] has in common, whatever their order."""
    shared: NDArray[np.float64] = (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)
    return shared


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Give the mean of float64[texts], and low and high of its 95 % bootstrap interval; the same values give the same.

    1,000 resamples with a fixed seed, a hundred at a time: those of many texts would not fit in memory at once.
    """
    random, count, mean = np.random.default_rng(_SEED), len(values), float(values.mean())
    means = np.concatenate(
        [
            values[random.integers(count, size=(_BLOCK_RESAMPLES, count))].mean(axis=1)
            for _ in range(_RESAMPLES // _BLOCK_RESAMPLES)
        ]
    )
    low, high = np.quantile(means, _QUANTILES)
    return mean, min(float(low), mean), max(float(high), mean)


def similarity_correlation(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Give Spearman's correlation of the cosines of all pairs of rows, of at most 3,000 evenly spaced rows."""
    chosen = np.linspace(0, len(expected) - 1, min(len(expected), _RANKED_TEXTS)).round().astype(int)
    upper = np.triu_indices(len(chosen), k=1)
    first, second = ((rows[chosen] @ rows[chosen].T)[upper] for rows in (expected, found))
    return rank_correlation(first, second)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Give Spearman's rank correlation of two float64[n]; ties share their mean rank.

    Returns:
        In [-1, 1]; 0.0 where one side is constant.
    """
    one, other = (ranked - ranked.mean() for ranked in (ranks(first), ranks(second)))
    spread = float(np.sqrt(np.sum(one**2) * np.sum(other**2)))
    return float(np.clip(np.sum(one * other) / spread, -1.0, 1.0)) if spread > 0.0 else 0.0


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank from 1, ties sharing the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranked: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse.reshape(-1)]
    return ranked


def exactness(recorded: NDArray[np.float32], vectors: NDArray[np.float32]) -> dict[str, float]:
    """Measure float32[texts, dim] against the vectors that another run of the same codes gave.

    Returns:
        The figures of `edgeq.records.Exactness`: cosines less the mean of the recorded vectors, and the largest error.
    """
    cosines = centred_cosines(recorded, vectors)
    return {
        "texts": len(vectors),
        "centred_cosine_mean": float(cosines.mean()),
        "centred_cosine_min": float(cosines.min()),
        "max_abs_error": float(np.abs(recorded.astype(np.float64) - vectors).max()),
    }
