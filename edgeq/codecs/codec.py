"""Encode embedding vectors as codes with a frozen codec, decode them, and keep the codec in one .npz file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.names import CodecName, parse
from edgeq.codecs.packing import Codes
from edgeq.codecs.quantizers import FloatArray, Quantizer, quantizer
from edgeq.codecs.rotations import random_rotation
from edgeq.codecs.statistics import arrays_sha256, read_arrays, require_vectors
from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.system.untrusted import parse_json

FORMAT = 1
_BLOCK_ROWS = 8192
_ARRAYS = {"kept", "mean", "matrix", "scale", "step", "codebooks"}


@dataclass(frozen=True)
class Codec:
    """Turn vectors into codes: choose dimensions, centre, turn, quantise.

    Attributes:
        name: what it is, such as `binary` or `pca128+int4`.
        dim: of the vectors that it takes.
        fitted_on: says which vectors its arrays were fitted on.
        count: how many.
        arrays: what was fitted. `kept` int32[live]: the dimensions that are taken. `mean` float32[live], of centred
            codecs and of int4 and int2; `matrix` float32[live, width], of trained rotations and PCA; `scale` float32,
            of int8; `step` float32[width], of int4 and int2; `codebooks` float32[parts, 256, width of a part], of PQ.
    """

    name: CodecName
    dim: int
    fitted_on: str
    count: int
    arrays: Mapping[str, NDArray[np.generic]]

    @property
    def size_bytes(self) -> int:
        """Give the bytes of one code."""
        return self._quantizer.size_bytes

    @cached_property
    def sha256(self) -> str:
        """Hash everything that decides the codes."""
        return arrays_sha256(self._record(), dict(self.arrays))

    @cached_property
    def _kept(self) -> NDArray[np.int32]:
        return self.arrays["kept"].astype(np.int32)

    @cached_property
    def _shift(self) -> FloatArray | None:
        """Give what is taken off before the matrix, float32[live]; int4 and int2 take their mean off themselves."""
        has_shift = self.name.is_centred or self.name.reduction == "pca" or self.name.rotation == "opq"
        return self.arrays["mean" if "matrix" not in self.arrays else "shift"].astype(np.float32) if has_shift else None

    @cached_property
    def _matrix(self) -> FloatArray | None:
        """Give the rotation, float32[live, width]."""
        if "matrix" in self.arrays:
            return self.arrays["matrix"].astype(np.float32)
        return random_rotation(len(self._kept)) if self.name.rotation == "random" else None

    @cached_property
    def _quantizer(self) -> Quantizer:
        width = len(self._kept) if self._matrix is None else self._matrix.shape[1]
        return quantizer(self.name, width, self.arrays)

    def encode(self, vectors: FloatArray) -> NDArray[np.generic]:
        """Encode float32[n, dim].

        Returns:
            uint8[n, bytes]; of `int8` int8[n, live], of `float16` and `float32` floats of that type.

        Raises:
            ConfigError: the shape is another, or a number is NaN, infinite or too large.
        """
        return self.typed(self.encode_bytes(vectors))

    def typed(self, codes: Codes) -> NDArray[np.generic]:
        """View uint8[n, bytes] as the type that `encode` gives."""
        types: dict[str, np.dtype[Any]] = {
            "int8": np.dtype(np.int8),
            "float16": np.dtype("<f2"),
            "float32": np.dtype("<f4"),
        }
        dtype = types.get(self.name.kind)
        return codes if dtype is None else np.ascontiguousarray(codes).view(dtype)

    def encode_bytes(self, vectors: FloatArray) -> Codes:
        """Encode float32[n, dim] as uint8[n, bytes].

        Raises:
            ConfigError: the shape is another, or a number is NaN, infinite or too large.
        """
        require_vectors(vectors, self.dim, f"codec {self.name.text}")
        codes = np.empty((len(vectors), self.size_bytes), np.uint8)
        for start in range(0, len(vectors), _BLOCK_ROWS):
            block = vectors[start : start + _BLOCK_ROWS]
            codes[start : start + _BLOCK_ROWS] = self._quantizer.encode(*self._turned(block))
        return codes

    def decode(self, codes: Codes) -> FloatArray:
        """Decode uint8[n, bytes] into what `queries` are multiplied with, float32[n, terms].

        Raises:
            ConfigError: the codes have another size.
        """
        if codes.ndim != 2 or codes.shape[1] != self.size_bytes:
            raise ConfigError(
                f"codec {self.name.text}: codes of shape {list(codes.shape)}; [n, {self.size_bytes}] is needed. "
                "Use the codec that made them."
            )
        return self._quantizer.decode(codes)

    def queries(self, vectors: FloatArray) -> FloatArray:
        """Prepare queries, float32[n, dim], in full precision: their dot product with decoded codes is the score.

        Up to a constant of each query the score estimates the dot product of the vectors.
        """
        require_vectors(vectors, self.dim, f"codec {self.name.text}")
        chosen = self._chosen(vectors)
        if self.name.is_centred and self._shift is not None and self.name.kind != "int8":
            chosen = chosen - self._shift  # of int8 the query keeps its mean: <q, d> = <q, d - mean> + <q, mean>
        return self._quantizer.query(chosen if self._matrix is None else chosen @ self._matrix)

    def _chosen(self, vectors: FloatArray) -> FloatArray:
        """Give the dimensions that are taken, of length 1 again where the vector was cut."""
        chosen: FloatArray = vectors[:, self._kept]
        if self.name.reduction != "first":
            return chosen
        norms = np.linalg.norm(chosen, axis=1, keepdims=True)
        return np.asarray(chosen / np.where(norms > 0, norms, 1), np.float32)

    def _turned(self, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Centre and turn vectors, float32[n, width]; give what the mean adds to their dot products, float32[n]."""
        shift = self._shift
        chosen: NDArray[Any] = self._chosen(vectors)
        offsets: FloatArray = np.zeros(len(chosen), np.float32)
        if shift is not None:
            chosen = chosen - shift
            offsets = (chosen @ shift).astype(np.float32)
        return (chosen if self._matrix is None else chosen @ self._matrix), offsets

    def _record(self) -> str:
        """Give the record in JSON."""
        return json.dumps(
            {
                "format": FORMAT, "codec": self.name.text, "dim": self.dim, "bytes": self.size_bytes,
                "fitted_on": self.fitted_on, "count": self.count,
            },
            sort_keys=True,
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """Write the codec as an .npz: its arrays, its record in JSON and the sha256 of both, without pickles."""
        buffer = io.BytesIO()
        texts = {"record": self._record(), "sha256": self.sha256}
        np.savez(buffer, **self.arrays, **{key: np.frombuffer(text.encode(), np.uint8) for key, text in texts.items()})  # type: ignore[arg-type]
        return buffer.getvalue()


def read_codec(path: Path) -> Codec:
    """Read a codec from its .npz.

    Raises:
        ConfigError: there is no such file.
        BundleCorrupt: it is truncated, of another version, or its content has another sha256.
    """
    arrays = read_arrays(path)
    if "record" not in arrays or "sha256" not in arrays:
        raise BundleCorrupt(f"{path}: is no codec: its record is not there. Give a file that edgeq wrote.")
    try:
        text = arrays.pop("record").tobytes().decode()
        wanted = arrays.pop("sha256").tobytes().decode()
        record: Any = parse_json(text)
        if record["format"] != FORMAT:
            raise BundleCorrupt(
                f"{path}: is of codec version {record['format']}; this edgeq reads version {FORMAT}. "
                "Use the edgeq that wrote it, or build the index again."
            )
        if arrays_sha256(text, arrays) != wanted or not set(arrays) <= _ARRAYS | {"shift"}:
            raise BundleCorrupt(f"{path}: its content is not the one with sha256 {wanted[:12]}.... Build it again.")
        return Codec(parse(record["codec"]), record["dim"], record["fitted_on"], record["count"], arrays)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise BundleCorrupt(f"{path}: its record cannot be read ({error}). Build it again.") from error
