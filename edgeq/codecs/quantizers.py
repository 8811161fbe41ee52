"""Quantise the numbers of transformed vectors: one class for each kind, all with codes as rows of bytes.

Each gives `decode(codes) @ queries(...)` as its estimate of the dot product, so that one scan serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.names import CodecName
from edgeq.codecs.packing import Codes, pack, pack_trits, packed_size, trits_size, unpack, unpack_trits
from edgeq.errors import ConfigError

FloatArray = NDArray[np.float32]
Arrays = Mapping[str, NDArray[np.generic]]

UNIFORM_DEVIATIONS = {4: 2.73, 2: 1.49}  # range of int4 and int2: the mean and so many standard deviations on each side
TERNARY_THRESHOLD = 0.6  # in root mean squares of a vector's own numbers
_RABITQ_STEPS = np.linspace(0.6, 3.0, 13)  # tried for each vector: how far its codes spread, in root mean squares


class Quantizer(Protocol):
    """Turn transformed vectors, float32[n, width], into bytes and back."""

    size_bytes: int

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        """Give uint8[n, size_bytes]; `offsets` float32[n] is what centring took from each dot product."""
        ...

    def decode(self, codes: Codes) -> FloatArray:
        """Give float32[n, width], or [n, width + 1] with the offset last."""
        ...

    def query(self, rows: FloatArray) -> FloatArray:
        """Give float32[n, width] or [n, width + 1], whose dot product with decoded codes estimates the vectors'."""
        ...


def quantizer(name: CodecName, width: int, arrays: Arrays) -> Quantizer:
    """Make the quantiser of a codec from its arrays."""
    if name.kind in ("float32", "float16"):
        return _Float(width, np.dtype("<f4" if name.kind == "float32" else "<f2"))
    if name.kind == "int8":
        return _Int8(width, float(arrays["scale"]))
    if name.kind == "int8-vector":
        return _Int8Vector(width)
    if name.kind == "uniform":
        return _Uniform(width, name.bits, arrays["mean"].astype(np.float32), arrays["step"].astype(np.float32))
    if name.kind == "binary":
        return _Binary(width)
    if name.kind == "ternary":
        return _Ternary(width)
    if name.kind == "rabitq":
        return _Rabitq(width, name.bits)
    return _Product(arrays["codebooks"].astype(np.float32))


class _Plain:
    """Take queries as they are."""

    def query(self, rows: FloatArray) -> FloatArray:
        return rows


class _Float(_Plain):
    """Keep float32 or float16, little endian."""

    def __init__(self, width: int, dtype: np.dtype[np.floating]) -> None:
        self._dtype = dtype
        self.size_bytes = width * dtype.itemsize

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        return _bytes(_narrow(rows, self._dtype))

    def decode(self, codes: Codes) -> FloatArray:
        return np.ascontiguousarray(codes).view(self._dtype).astype(np.float32)


class _Int8(_Plain):
    """Quantise to int8 by one scale for all dimensions, zero point 0, rounding half to even, clipped at +-127."""

    def __init__(self, width: int, scale: float) -> None:
        self._scale = np.float32(scale)
        self.size_bytes = width

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        return _bytes(np.clip(np.rint(rows / self._scale), -127, 127).astype(np.int8))

    def decode(self, codes: Codes) -> FloatArray:
        return np.ascontiguousarray(codes).view(np.int8).astype(np.float32) * self._scale


class _Int8Vector(_Plain):
    """Quantise to int8 by a scale for each vector, its largest value over 127; the float32 scale stands behind it."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.size_bytes = width + 4

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        largest = np.abs(rows).max(axis=1, keepdims=True)
        scales = (np.where(largest > 0, largest, 1.0) / np.float32(127)).astype("<f4")
        return np.hstack([_bytes(np.rint(rows / scales).astype(np.int8)), _bytes(scales)])

    def decode(self, codes: Codes) -> FloatArray:
        scales = np.ascontiguousarray(codes[:, self._width :]).view("<f4").astype(np.float32)
        return np.ascontiguousarray(codes[:, : self._width]).view(np.int8).astype(np.float32) * scales


class _Uniform(_Plain):
    """Quantise to 4 or 2 bits by evenly spaced levels around the mean of each dimension."""

    def __init__(self, width: int, bits: int, mean: FloatArray, step: FloatArray) -> None:
        self._bits, self._width, self._mean, self._step = bits, width, mean, step
        self._middle = np.float32((2**bits - 1) / 2)
        self.size_bytes = packed_size(width, bits)

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        levels = np.rint((rows - self._mean) / self._step + self._middle)
        return pack(np.clip(levels, 0, 2**self._bits - 1).astype(np.uint8), self._bits)

    def decode(self, codes: Codes) -> FloatArray:
        levels = unpack(codes, self._width, self._bits).astype(np.float32)
        decoded: FloatArray = (levels - self._middle) * self._step + self._mean
        return decoded


class _Binary(_Plain):
    """Keep the sign of each dimension in a bit, 1 for above 0, the first in the highest bit (`numpy.packbits`)."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.size_bytes = packed_size(width, 1)

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        return np.packbits(rows > 0, axis=1)

    def decode(self, codes: Codes) -> FloatArray:
        return np.unpackbits(codes, axis=1, count=self._width).astype(np.float32) * np.float32(2) - np.float32(1)


class _Corrected:
    """Keep two float16 behind the bits: the factor of the decoded direction, and what centring took off."""

    _width: int
    _bits_bytes: int

    def query(self, rows: FloatArray) -> FloatArray:
        return np.hstack([rows, np.ones((len(rows), 1), np.float32)])

    def _finished(self, bits: Codes, rows: FloatArray, signs: FloatArray, offsets: FloatArray) -> Codes:
        """Append factor and offset; the factor makes the estimate of the vector's dot product with itself exact."""
        along = np.sum(rows * signs, axis=1)
        squares = np.sum(rows * rows, axis=1)
        factors = np.where(along > 0, squares / np.where(along > 0, along, 1.0), 0.0)
        both = _narrow(np.stack([factors, offsets], axis=1).astype(np.float32), np.dtype("<f2"))
        return np.hstack([bits, _bytes(both)])

    def _decoded(self, signs: FloatArray, codes: Codes) -> FloatArray:
        both = np.ascontiguousarray(codes[:, self._bits_bytes :]).view("<f2").astype(np.float32)
        return np.hstack([signs * both[:, :1], both[:, 1:]])


class _Ternary(_Corrected):
    """Keep -1, 0 or 1 of each rotated dimension, five in a byte; the threshold follows each vector's own size."""

    def __init__(self, width: int) -> None:
        self._width, self._bits_bytes = width, trits_size(width)
        self.size_bytes = self._bits_bytes + 4

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        threshold = np.float32(TERNARY_THRESHOLD) * np.sqrt(np.mean(rows * rows, axis=1, keepdims=True))
        digits = ((rows > threshold).astype(np.int8) - (rows < -threshold).astype(np.int8) + 1).astype(np.uint8)
        return self._finished(pack_trits(digits), rows, digits.astype(np.float32) - 1, offsets)

    def decode(self, codes: Codes) -> FloatArray:
        digits = unpack_trits(codes[:, : self._bits_bytes], self._width)
        return self._decoded(digits.astype(np.float32) - 1, codes)


class _Rabitq(_Corrected):
    """Quantise the rotated direction to 1 to 4 bits a dimension with an unbiased factor (RaBitQ).

    Source: J. Gao, C. Long, RaBitQ, SIGMOD 2024, section 3; more bits: J. Gao et al., arXiv 2409.09913.
    """

    def __init__(self, width: int, bits: int) -> None:
        self._width, self._bits = width, bits
        self._bits_bytes = packed_size(width, bits)
        self._middle = np.float32((2**bits - 1) / 2)
        self.size_bytes = self._bits_bytes + 4

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        levels = self._levels(rows)
        return self._finished(pack(levels, self._bits), rows, levels.astype(np.float32) - self._middle, offsets)

    def decode(self, codes: Codes) -> FloatArray:
        levels = unpack(codes[:, : self._bits_bytes], self._width, self._bits)
        return self._decoded(levels.astype(np.float32) - self._middle, codes)

    def _levels(self, rows: FloatArray) -> Codes:
        """Choose the spread of codes by which each vector's direction is met best, uint8[n, width]."""
        if self._bits == 1:
            return (rows > 0).astype(np.uint8)
        size = np.sqrt(np.mean(rows * rows, axis=1, keepdims=True))
        scaled = rows / np.where(size > 0, size, 1.0)
        best = np.full(len(rows), -np.inf, np.float32)
        chosen = np.zeros(rows.shape, np.uint8)
        for spread in _RABITQ_STEPS:
            levels = np.clip(
                np.floor(scaled * (2 ** (self._bits - 1) / spread)) + 2 ** (self._bits - 1), 0, 2**self._bits - 1
            )
            signs = levels - self._middle
            near = np.sum(scaled * signs, axis=1) / np.linalg.norm(signs, axis=1)
            better = near > best
            chosen[better], best[better] = levels[better].astype(np.uint8), near[better]
        return chosen


class _Product(_Plain):
    """Name the nearest of 256 centroids in each part of the vector, a byte each (product quantisation)."""

    def __init__(self, codebooks: FloatArray) -> None:
        self._codebooks = codebooks  # [parts, 256, width of a part]
        self.size_bytes = len(codebooks)

    def encode(self, rows: FloatArray, offsets: FloatArray) -> Codes:
        parts, _, wide = self._codebooks.shape
        filled = _filled(rows, parts * wide)
        codes = np.empty((len(rows), parts), np.uint8)
        for part, centroids in enumerate(self._codebooks):
            own = filled[:, part * wide : (part + 1) * wide]
            distance = np.sum(centroids * centroids, axis=1) - 2 * (own @ centroids.T)
            codes[:, part] = distance.argmin(axis=1)
        return codes

    def decode(self, codes: Codes) -> FloatArray:
        parts = np.arange(len(self._codebooks))
        return self._codebooks[parts, codes].reshape(len(codes), -1)

    def query(self, rows: FloatArray) -> FloatArray:
        return _filled(rows, self._codebooks.shape[0] * self._codebooks.shape[2])


def _filled(rows: FloatArray, width: int) -> FloatArray:
    """Fill up float32[n, dim] with zeros to float32[n, width]."""
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def _bytes(rows: NDArray[np.generic]) -> Codes:
    """View the rows of an array as uint8[n, bytes]."""
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def _narrow(rows: FloatArray, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
    """Convert to float16 or float32, and refuse numbers that become infinite.

    Raises:
        ConfigError: a number is too large.
    """
    with np.errstate(over="ignore"):
        narrow = rows.astype(dtype)
    if not np.isfinite(narrow).all():
        raise ConfigError(
            f"codes: a value of {np.abs(rows).max():.3g} is too large for {np.dtype(dtype).name}. "
            "Choose codec float32, or normalise the vectors."
        )
    return narrow
