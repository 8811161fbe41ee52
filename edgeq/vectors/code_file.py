"""Append codes to a file of rows of bytes, and read them by a memory map; a killed run goes on after the last row."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.packing import Codes
from edgeq.errors import BundleCorrupt


def rows_in(path: Path, row_bytes: int) -> int:
    """Count the whole rows of a file; 0 where there is none."""
    return path.stat().st_size // row_bytes if path.is_file() else 0


def cut(path: Path, row_bytes: int, count: int) -> None:
    """Cut a file off behind `count` rows; make it where there is none."""
    with path.open("ab") as file:
        file.truncate(row_bytes * count)


def append(path: Path, rows: NDArray[np.generic]) -> None:
    """Write rows behind the last one, to the disk itself."""
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(rows).tobytes())
        file.flush()
        os.fsync(file.fileno())


def mapped(path: Path, row_bytes: int, count: int) -> Codes:
    """Map uint8[count, row_bytes].

    Raises:
        BundleCorrupt: the file is of another size.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size != row_bytes * count:
        raise BundleCorrupt(
            f"{path}: has {size} bytes; {count} codes of {row_bytes} bytes are needed. It is truncated or damaged: "
            "build the index again."
        )
    return np.memmap(path, np.uint8, "r", shape=(count, row_bytes))
