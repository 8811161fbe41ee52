"""Write and read the golden texts (`golden.jsonl`), their token ids, and FP32's and the artifact's vectors (.npz).

Equal data gives equal bytes. `golden.npz` holds no `embeddings` where the artifact was not run.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import BundleCorrupt, EdgeqError
from edgeq.system.untrusted import oversize, parse_json

VECTORS = "golden.npz"
TEXTS = "golden.jsonl"

# Name -> dtype of the arrays, in the order of the file.
_ARRAYS = {"input_ids": np.int64, "attention_mask": np.int64, "reference": np.float32, "embeddings": np.float32}
AGAIN = "Fetch or export the bundle again."
_MOST_BYTES = 1 << 30
# The header that numpy writes for version 1.0 of .npy. numpy's own reader evaluates Python literals of any depth.
_START, _MAGIC = struct.Struct("<8sH"), b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[<|][a-z]\d)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>(\d{1,15}(, |,|(?=\))))*)\), \} *\n"
)
_DTYPES = (b"<i8", b"<f4", b"|u1")
# The errors that `zipfile` raises on damaged files.
_DAMAGE = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, struct.error, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can hold


@dataclass(frozen=True)
class GoldenData:
    """Hold the golden texts with their token ids and vectors.

    Attributes:
        texts: as embedded, prompt included.
        input_ids: int64[texts, longest], padded.
        attention_mask: int64[texts, longest].
        reference: float32[texts, dim], FP32's vectors.
        embeddings: float32[texts, dim], the artifact's vectors; None when it was not run.
        pad_id: the padding token's id.
    """

    texts: tuple[str, ...]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    reference: NDArray[np.float32]
    embeddings: NDArray[np.float32] | None
    pad_id: int

    def token_ids(self) -> list[list[int]]:
        """Give each text's ids without padding."""
        return [
            [int(token) for token in ids[mask == 1]]
            for ids, mask in zip(self.input_ids, self.attention_mask, strict=True)
        ]


def write_golden(directory: Path, golden: GoldenData) -> None:
    """Write `golden.npz` and `golden.jsonl`; the same data gives the same bytes.

    Raises:
        EdgeqError: shapes or dtypes of the arrays do not fit together.
    """
    problem = _problem(golden)
    if problem is not None:
        raise EdgeqError(f"golden texts: {problem}. This is a defect of edgeq; please report it.")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in golden.texts]
    (directory / TEXTS).write_text("".join(lines), encoding="utf-8", newline="\n")
    held = {name: array for name in _ARRAYS if (array := getattr(golden, name)) is not None}
    write_arrays(directory / VECTORS, {**held, "pad_id": np.int64(golden.pad_id)})


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any] | np.generic]) -> None:
    """Write an uncompressed .npz file without time stamps."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            entry.create_system = 3  # `zipfile` would write the present system
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)


def read_golden(directory: Path) -> GoldenData:
    """Read the golden texts of a bundle; nothing is unpickled.

    Raises:
        BundleCorrupt: a file is missing or malformed, or the two do not fit together.
    """
    texts = read_lines(directory / TEXTS, "text")
    path = directory / VECTORS
    arrays = read_arrays(path, (*_ARRAYS, "pad_id"), optional="embeddings")
    pad_id = arrays.pop("pad_id")
    if pad_id.size != 1 or pad_id.dtype.kind not in "iu":
        raise BundleCorrupt(f"{path}: pad_id is no whole number. {AGAIN}")
    golden = GoldenData(
        texts, arrays["input_ids"], arrays["attention_mask"], arrays["reference"], arrays.get("embeddings"), int(pad_id)
    )
    problem = _problem(golden) or not_finite(golden.reference, golden.embeddings)
    if problem is not None:
        raise BundleCorrupt(f"{path}: {problem}. {AGAIN}")
    return golden


def not_finite(reference: NDArray[np.float32], embeddings: NDArray[np.float32] | None) -> str | None:
    """Say which vectors hold NaN or infinity, or None; they cannot be compared."""
    for name, array in (("reference", reference), ("embeddings", embeddings)):
        if array is not None and not np.isfinite(array).all():
            return f"{name} holds NaN or infinity"
    return None


def read_arrays(path: Path, names: Sequence[str], optional: str) -> dict[str, NDArray[Any]]:
    """Read arrays of an .npz file; nothing is unpickled.

    Raises:
        BundleCorrupt: the file or an array is missing or malformed.
    """
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise BundleCorrupt(f"{path}: {reason}. {AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            held = {entry.filename: entry for entry in archive.infolist()}
            wanted = [name for name in names if f"{name}.npy" in held or name != optional]
            return {name: _array(archive, held[f"{name}.npy"]) for name in wanted}
    except _DAMAGE as error:
        said = str(error) or type(error).__name__
        raise BundleCorrupt(f"{path}: golden vectors cannot be read ({said}). {AGAIN}") from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one array as `write_arrays` wrote it; the size in its header must fit the stored bytes."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _MOST_BYTES:
        raise ValueError(f"{entry.filename} is compressed or too large; edgeq stores arrays as they are")
    with archive.open(entry) as file:
        content = file.read()
    start = _START.size
    magic, length = _START.unpack(content[:start])
    header = _HEADER.fullmatch(content[start : start + length])
    if magic != _MAGIC or header is None or header["dtype"] not in _DTYPES:
        raise ValueError(f"{entry.filename} is no plain array of a known dtype")
    shape = tuple(int(size) for size in re.findall(rb"\d+", header["shape"]))
    dtype, data = np.dtype(header["dtype"].decode()), content[start + length :]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{entry.filename} has {len(data)} bytes, which are not {list(shape)} of {dtype}")
    return np.frombuffer(data, dtype).reshape(shape)


def read_lines(path: Path, key: str) -> tuple[str, ...]:
    """Read the string under a key from every line of a .jsonl file.

    Raises:
        BundleCorrupt: the file is missing or malformed.
    """
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise BundleCorrupt(f"{path}: {reason}. {AGAIN}")
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        texts = tuple(row[key] for row in rows)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BundleCorrupt(f"{path}: golden texts cannot be read ({error}). {AGAIN}") from error
    if not all(isinstance(text, str) for text in texts):
        raise BundleCorrupt(f"{path}: a golden text is no string. {AGAIN}")
    return texts


def _problem(golden: GoldenData) -> str | None:
    """Say why the arrays do not fit together, or None."""
    count = len(golden.texts)
    if count == 0:
        return "no texts; at least one is needed"
    for name, dtype in _ARRAYS.items():
        array = getattr(golden, name)
        if array is None:
            continue
        if array.dtype != dtype or array.ndim != 2 or len(array) != count:
            return f"{name} is {array.dtype}{list(array.shape)}; {np.dtype(dtype).name}[{count}, ...] is needed"
    if golden.input_ids.shape != golden.attention_mask.shape:
        return f"attention_mask has shape {golden.attention_mask.shape}, input_ids {golden.input_ids.shape}"
    if golden.embeddings is not None and golden.reference.shape != golden.embeddings.shape:
        return f"embeddings have shape {golden.embeddings.shape}, FP32's {golden.reference.shape}"
    return None
