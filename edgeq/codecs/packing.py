"""Pack small unsigned integers into bytes, the first one in the highest bits, and unpack them."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
_TRITS = 5  # of base 3 in a byte: 3**5 = 243


def packed_size(width: int, bits: int) -> int:
    """Count the bytes of `width` integers of `bits` bits; the last byte is filled up with zero bits."""
    return -(-width * bits // 8)


def pack(values: Codes, bits: int) -> Codes:
    """Pack uint8[n, width], each below 2**bits, into uint8[n, bytes], as `numpy.packbits` does for one bit."""
    if bits == 1:
        return np.packbits(values, axis=1)
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    planes = (values[:, :, None] >> shifts) & 1
    return np.packbits(planes.reshape(len(values), -1), axis=1)


def unpack(packed: Codes, width: int, bits: int) -> Codes:
    """Unpack uint8[n, bytes] into uint8[n, width]."""
    if bits == 1:
        return np.unpackbits(packed, axis=1, count=width)
    if 8 % bits == 0:
        return _byte_table(bits)[packed].reshape(len(packed), -1)[:, :width]
    planes = np.unpackbits(packed, axis=1, count=width * bits).reshape(len(packed), width, bits)
    found: Codes = (planes << np.arange(bits - 1, -1, -1, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return found


def trits_size(width: int) -> int:
    """Count the bytes of `width` integers in base 3, five in a byte."""
    return -(-width // _TRITS)


def pack_trits(values: Codes) -> Codes:
    """Pack uint8[n, width] of 0, 1 and 2 into uint8[n, bytes], five digits of base 3 in a byte, highest first."""
    size = trits_size(values.shape[1])
    filled = np.zeros((len(values), size * _TRITS), np.uint8)
    filled[:, : values.shape[1]] = values
    powers = 3 ** np.arange(_TRITS - 1, -1, -1)
    packed: Codes = (filled.reshape(len(values), size, _TRITS) * powers).sum(axis=2).astype(np.uint8)
    return packed


def unpack_trits(packed: Codes, width: int) -> Codes:
    """Unpack uint8[n, bytes] into uint8[n, width] of 0, 1 and 2."""
    digits: Codes = _trit_table()[packed].reshape(len(packed), -1)[:, :width]
    return digits


@functools.cache
def _byte_table(bits: int) -> Codes:
    """Give the integers of each byte, uint8[256, 8 // bits]."""
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    table: Codes = ((np.arange(256, dtype=np.uint8)[:, None] >> shifts) & (2**bits - 1)).astype(np.uint8)
    return table


@functools.cache
def _trit_table() -> Codes:
    """Give the digits of each byte in base 3, uint8[256, 5]."""
    powers = 3 ** np.arange(_TRITS - 1, -1, -1)
    digits: Codes = (np.arange(256)[:, None] // powers % 3).astype(np.uint8)
    return digits
