"""Write and read a calibration (.npz): the statistics of every observed tensor; equal statistics give equal bytes."""

from __future__ import annotations

import io
import itertools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.calibration.statistics import BINS, Histogram, Statistics
from edgeq.errors import ConfigError
from edgeq.graph import external_data
from edgeq.system.files import replacing


def save(statistics: Mapping[str, Statistics], path: Path) -> None:
    """Write the statistics as .npz without time stamps, so that equal statistics give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, item in statistics.items():
        arrays[f"{name}|minimum"], arrays[f"{name}|maximum"] = item.minimum, item.maximum
        if item.histogram is not None:
            arrays[f"{name}|limit"] = np.array(item.histogram.limit)
            arrays[f"{name}|counts"] = item.histogram.counts
        if item.mean is not None:
            arrays[f"{name}|mean"] = item.mean
        if item.moment is not None:
            arrays[f"{name}|moment"] = item.moment
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.save(buffer, arrays[name], allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue())


def load(path: Path) -> dict[str, Statistics]:
    """Read what `save` wrote; large arrays are mapped.

    Raises:
        ConfigError: not such a file.
    """
    try:
        arrays = _members(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: not a calibration file ({error}); calibrate again") from error
    kept = {}
    for name, _ in itertools.groupby(sorted(arrays), key=lambda key: key.rsplit("|", 1)[0]):
        histogram = None
        if f"{name}|counts" in arrays:
            counts = arrays[f"{name}|counts"]
            if counts.shape != (2 * BINS,):
                raise ConfigError(f"{path}: {name} has a histogram of shape {counts.shape}; ({2 * BINS},) is needed")
            histogram = Histogram(float(arrays[f"{name}|limit"]), counts)
        kept[name] = Statistics(
            arrays[f"{name}|minimum"], arrays[f"{name}|maximum"], histogram,
            arrays.get(f"{name}|moment"), arrays.get(f"{name}|mean"),
        )  # fmt: skip
    return kept


def _members(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a .npz, and map large ones that are not compressed: second moments can take gigabytes."""
    arrays: dict[str, NDArray[Any]] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as member:
                if entry.file_size < external_data.KEPT_BYTES or entry.compress_type != zipfile.ZIP_STORED:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                    continue
                np.lib.format.read_magic(member)
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                if dtype.hasobject or size != entry.file_size - member.tell():
                    raise ValueError(f"{name} is no array of numbers")
                start = _start(file, entry) + member.tell()
            arrays[name] = np.memmap(path, dtype, "r", start, shape, "F" if is_fortran else "C")
    return arrays


def _start(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Give the first byte of a member: behind its local header, whose name and extra field have lengths of their own.

    Source: PKWARE APPNOTE 6.3.10, section 4.3.7.
    """
    position = file.tell()
    file.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    file.seek(position)
    return entry.header_offset + 30 + int(name) + int(extra)
