"""Build and search approximate indexes of codes: HNSW graphs by FAISS, and inverted lists (IVF)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeq.codecs.codec import Codec
from edgeq.codecs.fit import require_faiss
from edgeq.codecs.names import CodecName
from edgeq.codecs.packing import Codes
from edgeq.codecs.statistics import read_arrays
from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.system.files import replacing
from edgeq.system.progress import Progress
from edgeq.vectors.scan import FloatArray, Rows, best, lanes, padded, rounded

Kind = Literal["exact", "hnsw", "ivf"]
KINDS: tuple[Kind, ...] = ("exact", "hnsw", "ivf")
FILES = {"hnsw": "hnsw.faiss", "ivf": "ivf.npz"}

NEIGHBOURS, BUILD_DEPTH = 16, 80  # HNSW's M and efConstruction
SEARCH_DEPTH = 128  # HNSW's efSearch, at least
LISTS_READ, FEWEST_LISTS_READ = 1 / 4, 8  # of IVF's lists
HNSW_KINDS = ("float32", "float16", "int8", "binary")
_ADDED_AT_ONCE, _CHECKPOINT_ROWS = 10_000, 100_000
_TRAINED_ON = 64  # vectors for each list's centroid, at most
_SEED = 5


def require_kind(kind: Kind, name: CodecName) -> None:
    """Refuse a codec that an index of this kind does not hold.

    Raises:
        ConfigError: it does not.
        ToolMissing: FAISS is not installed.
    """
    if kind == "hnsw" and name.kind not in HNSW_KINDS:
        raise ConfigError(
            f"index hnsw: holds codes of {', '.join(HNSW_KINDS)}, not of {name.text}. Choose one of them, "
            "or --index ivf."
        )
    if kind != "exact":
        require_faiss(f"index {kind}")


class Hnsw:
    """Search a graph of neighbours (HNSW); bits are compared by Hamming distance, other codes by dot product."""

    def __init__(self, codec: Codec, index: Any) -> None:
        """Take a codec and FAISS's index."""
        self._codec, self._index = codec, index

    def nearest(self, vectors: FloatArray, count: int) -> Rows:
        """Walk the graph; the queries of int8 are rounded to int8."""
        count = min(count, self._index.ntotal)
        self._index.hnsw.efSearch = max(SEARCH_DEPTH, 2 * count)
        if self._codec.name.kind == "binary":
            found: Rows = self._index.search(self._codec.encode_bytes(vectors), count)[1]
        else:
            queries = self._codec.queries(vectors)
            queries = padded(rounded(queries) if self._codec.name.kind == "int8" else queries, self._index.d)
            found = self._index.search(queries, count)[1]
        return found


def build_hnsw(codec: Codec, codes: Codes, path: Path, progress: Progress) -> None:
    """Add codes to a graph, and write it; a graph that a killed run left goes on from there.

    Args:
        codec: that made the codes.
        codes: uint8[n, bytes].
        path: of the graph; written every 100,000 codes.
        progress: called as `progress(stage, done, total)`.
    """
    faiss = require_faiss("index hnsw")
    is_binary = codec.name.kind == "binary"
    index = _read_hnsw(faiss, path, is_binary) if path.is_file() else None
    if index is None or index.ntotal > len(codes):
        index = _empty_hnsw(faiss, codec)
    write = faiss.write_index_binary if is_binary else faiss.write_index
    saved = index.ntotal
    for start in range(index.ntotal, len(codes), _ADDED_AT_ONCE):
        some = np.asarray(codes[start : start + _ADDED_AT_ONCE])
        if is_binary:
            index.add(np.ascontiguousarray(some))
        else:
            index.add(padded(_steps(codec, some), index.d))
        progress("graph", index.ntotal, len(codes))
        if index.ntotal - saved >= _CHECKPOINT_ROWS and index.ntotal < len(codes):
            with replacing(path) as partial:
                write(index, str(partial))
            saved = index.ntotal
    with replacing(path) as partial:
        write(index, str(partial))


def open_hnsw(codec: Codec, path: Path, count: int) -> Hnsw:
    """Read a graph.

    Raises:
        BundleCorrupt: it is truncated, or of another number of codes.
        ToolMissing: FAISS is not installed.
    """
    faiss = require_faiss("index hnsw")
    index = _read_hnsw(faiss, path, codec.name.kind == "binary")
    if index.ntotal != count:
        raise BundleCorrupt(f"{path}: holds {index.ntotal} codes; {count} are needed. Build the index again.")
    return Hnsw(codec, index)


def _read_hnsw(faiss: Any, path: Path, is_binary: bool) -> Any:
    try:
        return (faiss.read_index_binary if is_binary else faiss.read_index)(str(path))
    except RuntimeError as error:
        raise BundleCorrupt(f"{path}: is no graph, or is truncated. Build the index again.") from error


def _empty_hnsw(faiss: Any, codec: Codec) -> Any:
    """Make an empty graph for the codes of a codec."""
    kind = codec.name.kind
    if kind == "binary":
        index = faiss.IndexBinaryHNSW(8 * codec.size_bytes, NEIGHBOURS)
    elif kind == "float32":
        index = faiss.IndexHNSWFlat(lanes(codec.size_bytes // 4), NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    else:
        types = {"int8": faiss.ScalarQuantizer.QT_8bit_direct_signed, "float16": faiss.ScalarQuantizer.QT_fp16}
        width = lanes(codec.size_bytes // (1 if kind == "int8" else 2))
        index = faiss.IndexHNSWSQ(width, types[kind], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_DEPTH
    index.is_trained = True
    return index


def _steps(codec: Codec, codes: Codes) -> FloatArray:
    """Decode uint8[n, bytes] for a graph; int8 in whole steps, as FAISS's 8-bit quantiser takes them."""
    if codec.name.kind == "int8":
        return np.ascontiguousarray(codes).view(np.int8).astype(np.float32)
    return codec.decode(codes)


class Ivf:
    """Search the lists whose centroids are nearest to a query (IVF), for every codec."""

    def __init__(self, codec: Codec, codes: Codes, centroids: FloatArray, order: Rows, starts: Rows) -> None:
        """Take a codec, uint8[n, bytes], float32[lists, terms], the rows list by list, and where each list starts."""
        self._codec, self._codes = codec, codes
        self._centroids, self._order, self._starts = centroids, order, starts

    def nearest(self, vectors: FloatArray, count: int) -> Rows:
        """Read the nearest quarter of the lists, at least eight."""
        queries = self._codec.queries(vectors)
        lists = best(queries @ self._centroids.T, max(FEWEST_LISTS_READ, int(len(self._centroids) * LISTS_READ)))
        found = np.full((len(queries), min(count, len(self._codes))), -1, np.int64)
        for place, (query, chosen) in enumerate(zip(queries, lists, strict=True)):
            rows = np.concatenate([self._order[self._starts[each] : self._starts[each + 1]] for each in chosen])
            if len(rows):
                scores = self._codec.decode(np.asarray(self._codes[rows])) @ query
                kept = rows[best(scores[None], found.shape[1])[0]]
                found[place, : len(kept)] = kept
        return found


def build_ivf(codec: Codec, codes: Codes, progress: Progress) -> Ivf:
    """Cluster codes by FAISS's k-means, about 4 * sqrt(n) lists, and sort them into lists.

    Args:
        codec: that made the codes.
        codes: uint8[n, bytes].
        progress: called as `progress(stage, done, total)`.
    """
    faiss = require_faiss("index ivf")
    count = len(codes)
    lists = max(1, min(int(4 * count**0.5), count // 39))
    chosen = np.random.default_rng(_SEED).choice(count, min(count, _TRAINED_ON * lists), replace=False)
    chosen.sort()
    sample = codec.decode(np.asarray(codes[chosen]))
    means = faiss.Kmeans(sample.shape[1], lists, niter=10, seed=_SEED, verbose=False, min_points_per_centroid=1)
    means.train(np.ascontiguousarray(sample))
    nearest = np.empty(count, np.int64)
    for start in range(0, count, _ADDED_AT_ONCE):
        some = np.ascontiguousarray(codec.decode(np.asarray(codes[start : start + _ADDED_AT_ONCE])))
        nearest[start : start + len(some)] = means.index.search(some, 1)[1][:, 0]
        progress("lists", start + len(some), count)
    starts = np.concatenate([[0], np.cumsum(np.bincount(nearest, minlength=lists))]).astype(np.int64)
    order = np.argsort(nearest, kind="stable").astype(np.int64)
    return Ivf(codec, codes, np.asarray(means.centroids, np.float32), order, starts)


def save_ivf(found: Ivf, path: Path) -> None:
    """Write the lists as an .npz without pickles."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, centroids=found._centroids, order=found._order, starts=found._starts)


def open_ivf(codec: Codec, codes: Codes, path: Path) -> Ivf:
    """Read lists.

    Raises:
        BundleCorrupt: they are truncated, or of another number of codes.
    """
    arrays = read_arrays(path, 8 << 30)
    order, starts = arrays.get("order"), arrays.get("starts")
    if order is None or starts is None or len(order) != len(codes) or int(starts[-1]) != len(codes):
        raise BundleCorrupt(f"{path}: its lists are not of {len(codes)} codes. Build the index again.")
    return Ivf(
        codec, codes, arrays["centroids"].astype(np.float32), order.astype(np.int64), starts.astype(np.int64)
    )  # fmt: skip
