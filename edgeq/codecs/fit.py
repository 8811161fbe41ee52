"""Fit codecs: on statistics of vectors, or by training on a sample (PCA, ITQ, product quantisation by FAISS)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.codec import Codec
from edgeq.codecs.names import CodecName, parse
from edgeq.codecs.quantizers import UNIFORM_DEVIATIONS, FloatArray
from edgeq.codecs.rotations import itq, principal_components, random_rotation
from edgeq.codecs.statistics import VectorStatistics, int8_limit, observe_vectors, require_vectors
from edgeq.errors import ConfigError, ToolMissing

if TYPE_CHECKING:
    from types import ModuleType

FEWEST_SAMPLES = 10_000  # to train on: 39 for each of 256 centroids
_LEAST_SPREAD = 1e-6  # of the largest value: a dimension that is always the same gets so narrow a range


def codec_from_statistics(text: str, found: VectorStatistics) -> Codec:
    """Make a codec that needs no training from the statistics of vectors.

    Raises:
        ConfigError: there is no such codec, or it must be trained or fitted on whole vectors.
    """
    name = parse(text)
    if name.needs_sample:
        reason = "is trained on" if name.is_trained else "needs"
        raise ConfigError(
            f"codec {text}: {reason} a sample of your texts, and a bundle holds none. Use the codec.npz that "
            "`edgeq index --codec` leaves in its folder."
        )
    return _plain(name, found)


def fit_codec(text: str, sample: FloatArray, origin: str, known: VectorStatistics | None = None) -> Codec:
    """Fit a codec on a sample of vectors.

    Args:
        text: the codec's name.
        sample: float32[n, dim], at least 10,000 where the codec is trained.
        origin: says which texts these are of.
        known: statistics of a bundle; where the codec needs no sample, they are taken instead.

    Raises:
        ConfigError: there is no such codec, the sample is too small, or the dimension does not fit.
        ToolMissing: PQ and OPQ are trained by FAISS, which is not installed.
    """
    name = parse(text)
    if known is not None and not name.needs_sample:
        return _plain(name, known)
    require_vectors(sample, None, origin)
    if name.is_trained and len(sample) < FEWEST_SAMPLES:
        raise ConfigError(
            f"codec {text}: is trained on at least {FEWEST_SAMPLES} texts, and {origin} gives {len(sample)}. "
            "Give more texts, or choose one of int8, int4, rabitq2, rabitq or binary."
        )
    if name.reduction == "first":
        _require_width(name, sample.shape[1])
        head = sample[:, : name.width]
        norms = np.linalg.norm(head, axis=1, keepdims=True)
        sample_of_head = (head / np.where(norms > 0, norms, 1.0)).astype(np.float32)
        own = observe_vectors(sample_of_head, origin)
        if name.is_trained:
            return _trained(name, sample_of_head, own, sample.shape[1])
        return _plain(name, replace(own, dim=sample.shape[1]))
    own = observe_vectors(sample, origin)
    return _trained(name, sample, own, sample.shape[1]) if name.is_trained else _plain(name, own)


def _plain(name: CodecName, found: VectorStatistics) -> Codec:
    """Make a codec from statistics of the vectors that it quantises."""
    kept = found.kept
    if name.reduction == "first":
        _require_width(name, found.dim)
        kept = kept[kept < name.width]
    arrays: dict[str, NDArray[np.generic]] = {"kept": kept}
    if name.is_centred:
        arrays["mean"] = found.mean[: len(kept)]
    limit = found.centred_limit if name.is_centred else found.limit
    arrays |= _scales(name, found.mean, found.deviation, limit)
    return Codec(name, found.dim, found.origin, found.count, arrays)


def _scales(name: CodecName, mean: FloatArray, deviation: FloatArray, limit: float) -> dict[str, NDArray[np.generic]]:
    """Give the arrays of int8 (one scale), int4 and int2 (mean and step of each dimension)."""
    if name.kind == "int8":
        return {"scale": np.asarray(limit / 127, np.float32)}
    if name.kind == "uniform":
        spread = np.maximum(deviation, np.float32(_LEAST_SPREAD * limit))
        step = 2 * UNIFORM_DEVIATIONS[name.bits] * spread / (2**name.bits - 1)
        return {"mean": mean, "step": step.astype(np.float32)}
    return {}


def _trained(name: CodecName, sample: FloatArray, own: VectorStatistics, dim: int) -> Codec:
    """Train PCA, ITQ, PQ and OPQ in this order on float32[n, dimensions to choose from]."""
    kept = own.kept
    arrays: dict[str, NDArray[np.generic]] = {"kept": kept}
    rows = sample[:, kept]
    matrix: FloatArray | None = None
    if name.reduction == "pca":
        _require_width(name, len(kept))
        rows = rows - own.mean
        matrix = principal_components(rows, name.width)
        rows = rows @ matrix
        arrays["shift"] = own.mean
    elif name.rotation in ("itq", "opq"):
        rows = rows - own.mean
        arrays["shift"] = own.mean
    if name.rotation == "itq":
        turned = itq(rows)
        matrix = turned if matrix is None else matrix @ turned
    elif name.rotation == "opq":
        turned = _opq(rows, name)
        rows = rows @ turned
        matrix = turned if matrix is None else matrix @ turned
    elif name.rotation == "random" and matrix is not None:
        matrix = matrix @ random_rotation(name.width)
    if matrix is not None:
        arrays["matrix"] = matrix
    if name.kind == "pq":
        arrays["codebooks"] = _codebooks(rows, name)
    else:
        arrays |= _scales(name, rows.mean(axis=0), rows.std(axis=0), int8_limit(rows))
    return Codec(name, dim, own.origin, own.count, arrays)


def _opq(rows: FloatArray, name: CodecName) -> FloatArray:
    """Train the rotation of optimised product quantisation by FAISS, float32[dim, dim filled up to the parts]."""
    faiss = require_faiss(name.text)
    wide = _wide(rows, name)
    trained = faiss.OPQMatrix(rows.shape[1], name.parts, wide)
    trained.train(np.ascontiguousarray(rows))
    matrix: FloatArray = faiss.vector_to_array(trained.A).reshape(wide, rows.shape[1]).T.copy()
    return matrix


def _codebooks(rows: FloatArray, name: CodecName) -> FloatArray:
    """Train 256 centroids of each part by FAISS's k-means, float32[parts, 256, width of a part]."""
    faiss = require_faiss(name.text)
    wide = _wide(rows, name)
    filled = np.pad(rows, ((0, 0), (0, wide - rows.shape[1])))
    trained = faiss.ProductQuantizer(wide, name.parts, 8)
    trained.train(np.ascontiguousarray(filled))
    books: FloatArray = faiss.vector_to_array(trained.centroids).reshape(name.parts, 256, wide // name.parts).copy()
    return books


def _wide(rows: FloatArray, name: CodecName) -> int:
    """Give the width that the parts divide.

    Raises:
        ConfigError: there are more parts than dimensions.
    """
    if name.parts > rows.shape[1]:
        raise ConfigError(
            f"codec {name.text}: {name.parts} parts of {rows.shape[1]} dimensions; each needs one. Ask for fewer bytes."
        )
    return int(-(-rows.shape[1] // name.parts) * name.parts)


def _require_width(name: CodecName, dim: int) -> None:
    if name.width > dim:
        raise ConfigError(
            f"codec {name.text}: keeps {name.width} dimensions, and the vectors have {dim}. Ask for at most {dim}."
        )


def require_faiss(purpose: str) -> ModuleType:
    """Import FAISS.

    Raises:
        ToolMissing: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ToolMissing(
            f"{purpose}: needs FAISS, which is not installed. Run: pip install 'edgeq[vectors]'"
        ) from error
    loaded: ModuleType = faiss
    return loaded
