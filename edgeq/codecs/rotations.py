"""Make orthogonal float32 matrices: randomised Hadamard rotations, principal components, and ITQ."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

_ROUNDS, _SEED = 4, 20
_ITQ_STEPS = 50

Matrix = NDArray[np.float32]


@functools.lru_cache(maxsize=4)
def random_rotation(width: int) -> Matrix:
    """Give a random rotation, float32[width, width], the same on every machine: nothing of it need be stored.

    Four rounds, each of random signs and a Walsh-Hadamard transform of as many dimensions as the largest power of 2
    within the width: in turn the first ones and the last ones (the fast rotation that RaBitQ's authors use).
    """
    signs = np.random.PCG64(_SEED).random_raw(_ROUNDS * width) >> np.uint64(63)
    rows = np.eye(width)
    block = 1 << (width.bit_length() - 1)
    for turn, bits in enumerate(signs.reshape(_ROUNDS, width)):
        rows = rows * np.where(bits, 1.0, -1.0)
        start = 0 if turn % 2 == 0 else width - block
        rows[:, start : start + block] = _hadamard(rows[:, start : start + block])
    return rows.astype(np.float32)


def _hadamard(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Transform float64[n, 2**k] by the orthonormal Walsh-Hadamard matrix."""
    count, size = rows.shape
    step = 1
    while step < size:
        pairs = rows.reshape(count, size // (2 * step), 2, step)
        rows = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(count, size)
        step *= 2
    scaled: NDArray[np.float64] = rows / np.sqrt(size)
    return scaled


def principal_components(centred: NDArray[np.float32], width: int) -> Matrix:
    """Give the directions of largest variance, float32[dim, width], of float32[n, dim] less its mean.

    The sign of each is fixed: its largest entry is positive.
    """
    wide = centred.astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide)
    chosen = vectors[:, ::-1][:, :width]
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(axis=0)[None], axis=0)
    return (chosen * np.where(largest < 0, -1.0, 1.0)).astype(np.float32)


def itq(centred: NDArray[np.float32]) -> Matrix:
    """Train the rotation of iterative quantisation, float32[dim, dim], on float32[n, dim] less its mean.

    Source: Y. Gong, S. Lazebnik, Iterative Quantization, CVPR 2011, section 3: alternate the signs of the turned
    vectors and the orthogonal Procrustes problem between vectors and signs.
    """
    wide = centred.astype(np.float64)
    turned = random_rotation(wide.shape[1]).astype(np.float64)
    for _ in range(_ITQ_STEPS):
        left, _, right = np.linalg.svd(wide.T @ np.where(wide @ turned > 0, 1.0, -1.0))
        turned = left @ right
    return turned.astype(np.float32)
