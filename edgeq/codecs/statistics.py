"""Observe embedding vectors, and keep what codecs need of them: live dimensions, mean, spread and int8's range."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.system.untrusted import oversize

FILE = "codecs.npz"
FORMAT = 1
FEWEST_VECTORS = 16
_ZERO_RATIO = 1e-6  # of the largest value: a dimension that never passes it holds no information
_MOST_BYTES = 64 << 20
_LEAST_LIMIT = 1e-30
_LIMIT_RATIOS = tuple(step / 20 for step in range(20, 9, -1))  # of the largest value, from 1 to 0.5

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class VectorStatistics:
    """Hold what was observed on vectors of `dim` dimensions.

    Attributes:
        dim: of the vectors.
        kept: int32[live], the dimensions that are not always zero, ascending.
        mean: float32[live].
        deviation: float32[live], the standard deviation of each.
        limit: the absolute value that int8's code 127 stands for: the one of least squared error, at most the largest.
        centred_limit: the same of the numbers less their mean.
        count: of the vectors.
        origin: says which texts they are of.
    """

    dim: int
    kept: NDArray[np.int32]
    mean: FloatArray
    deviation: FloatArray
    limit: float
    centred_limit: float
    count: int
    origin: str


def require_vectors(vectors: FloatArray, dim: int | None, where: str) -> None:
    """Refuse what is no float32[n, dim] of finite numbers.

    Raises:
        ConfigError: shape or numbers are others.
    """
    if vectors.ndim != 2 or (dim is not None and vectors.shape[1] != dim):
        needed = "[n, dim]" if dim is None else f"[n, {dim}]"
        raise ConfigError(
            f"{where}: vectors of shape {list(vectors.shape)}; {needed} is needed. Give the same model's."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ConfigError(
            f"{where}: vector {row} (from 0) holds NaN or infinity, of which no code can be made. "
            "Run `edgeq validate` on the bundle."
        )


def observe_vectors(vectors: FloatArray, origin: str) -> VectorStatistics:
    """Observe float32[n, dim].

    Raises:
        ConfigError: there are fewer than 16, they are not finite, or all of them are zero.
    """
    require_vectors(vectors, None, origin)
    if len(vectors) < FEWEST_VECTORS:
        raise ConfigError(
            f"{origin}: {len(vectors)} vectors; at least {FEWEST_VECTORS} are needed to fit codes. Give more texts."
        )
    largest = np.abs(vectors).max(axis=0)
    if float(largest.max()) == 0.0:
        raise ConfigError(f"{origin}: every vector is zero, of which no code can be made. Run `edgeq validate`.")
    kept = np.flatnonzero(largest > _ZERO_RATIO * largest.max()).astype(np.int32)
    live = vectors[:, kept].astype(np.float64)
    mean = live.mean(axis=0).astype(np.float32)
    return VectorStatistics(
        vectors.shape[1], kept, mean, live.std(axis=0).astype(np.float32), int8_limit(vectors[:, kept]),
        int8_limit(vectors[:, kept] - mean), len(vectors), origin,
    )  # fmt: skip


def int8_limit(rows: FloatArray) -> float:
    """Choose the value of int8's code 127 for float32[n, dim]: of least squared error, clipping counted.

    A single large number would take a step from all the others (docs/decisions/vectors.md).
    """
    largest = float(np.abs(rows).max())
    if largest == 0.0:
        return _LEAST_LIMIT  # of vectors that are all the same, less their mean
    errors = []
    for ratio in _LIMIT_RATIOS:
        scale = np.float32(ratio * largest / 127)
        errors.append(float(np.mean((np.clip(np.rint(rows / scale), -127, 127) * scale - rows) ** 2)))
    return _LIMIT_RATIOS[int(np.argmin(errors))] * largest


def statistics_bytes(found: VectorStatistics) -> bytes:
    """Write statistics as an .npz without pickles; the same statistics give the same bytes."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        format=np.int32(FORMAT),
        dim=np.int32(found.dim),
        kept=found.kept,
        mean=found.mean,
        deviation=found.deviation,
        limit=np.float32(found.limit),
        centred_limit=np.float32(found.centred_limit),
        count=np.int32(found.count),
        origin=np.frombuffer(found.origin.encode(), np.uint8),
    )
    return buffer.getvalue()


def read_statistics(path: Path) -> VectorStatistics:
    """Read statistics from the .npz of a bundle.

    Raises:
        BundleCorrupt: it is truncated, of another version, or not what `statistics_bytes` writes.
    """
    arrays = read_arrays(path)
    keys = {"format", "dim", "kept", "mean", "deviation", "limit", "centred_limit", "count", "origin"}
    if "format" in arrays and int(arrays["format"]) != FORMAT:
        raise BundleCorrupt(
            f"{path}: is of version {int(arrays['format'])}; this edgeq reads version {FORMAT}. "
            "Use the edgeq that wrote it, or export again."
        )
    if set(arrays) != keys:
        raise BundleCorrupt(f"{path}: holds {', '.join(sorted(arrays))}; {', '.join(sorted(keys))} are needed.")
    kept, mean, deviation = arrays["kept"], arrays["mean"], arrays["deviation"]
    dim, limit, centred = int(arrays["dim"]), float(arrays["limit"]), float(arrays["centred_limit"])
    is_sound = kept.ndim == 1 and 0 < len(kept) <= dim and mean.shape == deviation.shape == kept.shape
    if not is_sound or not 0 <= int(kept.min()) <= int(kept.max()) < dim or not 0 < limit < np.inf:
        raise BundleCorrupt(f"{path}: its arrays do not belong together. Fetch or export the bundle again.")
    require_vectors(np.stack([mean, deviation]), len(kept), str(path))
    return VectorStatistics(
        dim, kept.astype(np.int32), mean.astype(np.float32), deviation.astype(np.float32), limit,
        centred, int(arrays["count"]), arrays["origin"].tobytes().decode("utf-8", "replace"),
    )  # fmt: skip


def read_arrays(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, NDArray[np.generic]]:
    """Read every array of an .npz, refusing pickles.

    Raises:
        ConfigError: there is no such file.
        BundleCorrupt: it is too large, truncated, no .npz, or holds pickles.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Check the path.")
    reason = oversize(path, most_bytes)
    if reason is not None:
        raise BundleCorrupt(f"{path}: {reason}. Make it again.")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise BundleCorrupt(f"{path}: cannot be read ({error}); it is damaged or truncated. Make it again.") from error


def arrays_sha256(record: str, arrays: dict[str, NDArray[np.generic]]) -> str:
    """Hash a record and arrays by name, dtype, shape and content."""
    digest = hashlib.sha256(record.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
