"""Search codes exactly: by numpy for every codec, by FAISS for those it scans itself, and score candidates again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.codec import Codec
from edgeq.codecs.fit import require_faiss
from edgeq.codecs.packing import Codes
from edgeq.errors import ToolMissing

if TYPE_CHECKING:
    from types import ModuleType

FloatArray = NDArray[np.float32]
Rows = NDArray[np.int64]

_BLOCK_ROWS, _BLOCK_QUERIES = 16_384, 256
_LANES = 64  # FAISS's kernels take widths that are a multiple of their registers', and are 20 times slower on others
_FAISS_KINDS = ("float32", "float16", "int8", "binary", "pq")
_TWICE = 2  # int8 queries choose so many times the rows that float queries order


class Searcher(Protocol):
    """Give the rows of codes that are nearest to queries."""

    def nearest(self, vectors: FloatArray, count: int) -> Rows:
        """Give int64[queries, count], nearest first, for float32[queries, dim]; -1 where fewer were found."""
        ...


def best(scores: NDArray[np.floating], count: int) -> Rows:
    """Give the positions of the `count` largest of each row, largest first, ties in order of position."""
    count = min(count, scores.shape[1])
    chosen = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    chosen.sort(axis=1)
    order = np.argsort(-np.take_along_axis(scores, chosen, axis=1), axis=1, kind="stable")
    found: Rows = np.take_along_axis(chosen, order, axis=1).astype(np.int64)
    return found


class NumpyScan:
    """Decode the codes block by block, and multiply them with the queries."""

    def __init__(self, codec: Codec, codes: Codes) -> None:
        """Take a codec and uint8[n, bytes], which may lie in a mapped file."""
        self._codec, self._codes = codec, codes

    def nearest(self, vectors: FloatArray, count: int) -> Rows:
        """Scan all codes, each decoded once; of each block only the best go on to the next."""
        queries = self._codec.queries(vectors)
        count = min(count, len(self._codes))
        parts = [slice(start, start + _BLOCK_QUERIES) for start in range(0, len(queries), _BLOCK_QUERIES)]
        scores = [np.empty((len(queries[part]), 0), np.float32) for part in parts]
        rows = [np.empty((len(queries[part]), 0), np.int64) for part in parts]
        for start in range(0, len(self._codes), _BLOCK_ROWS):
            decoded = self._codec.decode(np.asarray(self._codes[start : start + _BLOCK_ROWS]))
            for place, part in enumerate(parts):
                some = queries[part] @ decoded.T
                chosen = best(some, count)
                joined = np.hstack([scores[place], np.take_along_axis(some, chosen, axis=1)])
                names = np.hstack([rows[place], chosen + start])
                kept = best(joined, count)
                scores[place] = np.take_along_axis(joined, kept, axis=1)
                rows[place] = np.take_along_axis(names, kept, axis=1)
        return np.concatenate(rows) if rows else np.empty((0, count), np.int64)


class FaissScan:
    """Scan codes in memory by FAISS: float16 and int8 by its scalar quantiser, bits and PQ by its product quantiser."""

    def __init__(self, faiss: ModuleType, codec: Codec, codes: Codes) -> None:
        """Copy uint8[n, bytes] into an index, without encoding anything again."""
        self._codec, self._codes = codec, codes
        self._index = _filled(faiss, codec, codes)

    def nearest(self, vectors: FloatArray, count: int) -> Rows:
        """Scan all codes; of int8 rounded queries choose twice the rows that are asked for, and floats order them."""
        queries = self._codec.queries(vectors)
        if self._codec.name.kind != "int8":
            return self._search(queries, count)
        wide = min(_TWICE * count, len(self._codes))
        return rescored(self._codec, self._codes, vectors, self._search(rounded(queries), wide), count)

    def _search(self, queries: FloatArray, count: int) -> Rows:
        found: Rows = self._index.search(padded(queries, self._index.d), min(count, len(self._codes)))[1]
        return found


def exact(codec: Codec, codes: Codes) -> Searcher:
    """Give what scans all codes, by FAISS where it is installed and knows them.

    Args:
        codec: that made the codes.
        codes: uint8[n, bytes].
    """
    if codec.name.kind in _FAISS_KINDS:
        try:
            return FaissScan(require_faiss("search"), codec, codes)
        except ToolMissing:
            pass
    return NumpyScan(codec, codes)


def rescored(codec: Codec, codes: Codes, vectors: FloatArray, candidates: Rows, count: int) -> Rows:
    """Order candidates by finer codes, and keep the best.

    Args:
        codec: of the finer codes.
        codes: uint8[n, bytes], which may lie in a mapped file: only the candidates' are read.
        vectors: float32[queries, dim].
        candidates: int64[queries, candidates], -1 where there is none.
        count: how many to keep.
    """
    queries = codec.queries(vectors)
    kept = np.full((len(candidates), min(count, candidates.shape[1])), -1, np.int64)
    for start in range(0, len(candidates), _BLOCK_QUERIES):
        some = candidates[start : start + _BLOCK_QUERIES]
        read = np.asarray(codes[np.maximum(some, 0).reshape(-1)])
        decoded = codec.decode(read).reshape(*some.shape, -1)
        scores = np.einsum("qct,qt->qc", decoded, queries[start : start + len(some)])
        scores[some < 0] = -np.inf
        order = best(scores, kept.shape[1])
        kept[start : start + len(some)] = np.take_along_axis(some, order, axis=1)
    return kept


def padded(rows: FloatArray, width: int) -> FloatArray:
    """Fill up float32[n, w] with zeros to `width` columns."""
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, width - rows.shape[1]))), np.float32)


def rounded(queries: FloatArray) -> FloatArray:
    """Round float32[n, width] to whole numbers of -127 to 127, each row by a scale of its own: its order stays."""
    largest = np.abs(queries).max(axis=1, keepdims=True)
    return np.rint(queries * (np.float32(127) / np.where(largest > 0, largest, np.float32(1))))


def lanes(width: int) -> int:
    """Round a width up to what FAISS's kernels are fast on."""
    return -(-width // _LANES) * _LANES


def _filled(faiss: ModuleType, codec: Codec, codes: Codes) -> Any:
    """Make a FAISS index that holds these codes."""
    inner, kind = faiss.METRIC_INNER_PRODUCT, codec.name.kind
    if kind == "binary":
        return _signs(faiss, codes)
    if kind == "pq":
        parts, _, wide = codec.arrays["codebooks"].shape
        index = faiss.IndexPQ(parts * wide, parts, 8, inner)
        faiss.copy_array_to_vector(codec.arrays["codebooks"].astype(np.float32).ravel(), index.pq.centroids)
        stored = codes
    else:
        bytes_each = {"float32": 4, "float16": 2, "int8": 1}[kind]
        width = lanes(codec.size_bytes // bytes_each)
        stored = np.pad(codes, ((0, 0), (0, width * bytes_each - codes.shape[1])))
        if kind == "int8":
            stored ^= 0x80  # FAISS keeps code + 128
            index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit_direct_signed, inner)
        elif kind == "float16":
            index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, inner)
        else:
            index = faiss.IndexFlatIP(width)
    index.is_trained = True
    faiss.copy_array_to_vector(np.ascontiguousarray(stored).ravel(), index.codes)
    index.ntotal = len(codes)
    return index


def _signs(faiss: ModuleType, codes: Codes) -> Any:
    """Make a fast-scan index of sign bits: 4 bits name one of the 16 corners of +-1.

    No query becomes bits: FAISS rounds each query's table of sums to 8 bits.
    """
    corners = np.array([[1.0 if code >> (3 - place) & 1 else -1.0 for place in range(4)] for code in range(16)])
    parts = 2 * codes.shape[1]
    plain = faiss.IndexPQ(4 * parts, parts, 4, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.tile(corners, (parts, 1)).astype(np.float32).ravel(), plain.pq.centroids)
    plain.is_trained = True
    swapped = (codes >> 4) | (codes << 4)  # FAISS has the first in the lowest bits
    faiss.copy_array_to_vector(np.ascontiguousarray(swapped).ravel(), plain.codes)
    plain.ntotal = len(codes)
    return faiss.IndexPQFastScan(plain)
