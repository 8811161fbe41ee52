"""Unpack an untrusted archive within limits of size and number, and never outside its folder.

Accepted is what `edgeq.release.pack` writes: regular files below one folder. Links, devices, absolute paths, `..`,
duplicate names, tar extensions and zip comments are refused, each with its own message. Sizes are compared with their
limits before a byte is read or written.
"""

from __future__ import annotations

import errno
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgeq.errors import BundleCorrupt
from edgeq.release.pack import import_zstandard
from edgeq.system.files import storage_errors
from edgeq.system.untrusted import unsafe_name

_MOST_FILES = 10_000
_MOST_BYTES = 16 << 30
# Integer weights hardly compress, so an archive that grows more is malicious; small files may grow freely.
_MOST_GROWTH, _GROWTH_FREE_BYTES = 200, 64 << 20
_WINDOW_BYTES = 1 << 27
_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_ZIP_END = struct.Struct("<4s4H2LH")
_DIRECTORY_BYTES = 16 << 20
_AGAIN = "Fetch the archive again, from where you trust it."


def unpack(archive: Path, into: Path) -> Path:
    """Write an archive's files into an empty folder, and give the archive's one top folder.

    Raises:
        BundleCorrupt: it is no archive of `edgeq release`, it is damaged, or an entry could do harm.
        StorageFailed: the disk refuses.
        ToolMissing: its compressor is not installed.
    """
    with storage_errors(f"unpacking {archive}"), archive.open("rb") as file:
        size = archive.stat().st_size
        target = _Target(archive, into, min(_MOST_BYTES, _GROWTH_FREE_BYTES + _MOST_GROWTH * size))
        magic = file.read(4)
        file.seek(0)
        if magic == b"\x28\xb5\x2f\xfd":
            _unpack_tar(file, target)
        elif magic == b"PK\x03\x04":
            _unpack_zip(file, size, target)
        else:
            raise BundleCorrupt(f"{archive}: neither a .tar.zst nor a .zip archive (it begins {magic!r}). {_AGAIN}")
        return target.folder()


class _Target:
    """Write an archive's files one by one, within the limits, and refuse names that a bundle cannot have."""

    def __init__(self, archive: Path, into: Path, most_bytes: int) -> None:
        self._archive = archive
        self._into = into
        self._left = most_bytes
        self._most = most_bytes
        self._names: set[str] = set()
        self._parents: set[str] = set()
        self._tops: set[str] = set()

    def problem(self, said: str) -> BundleCorrupt:
        """Make an error about this archive."""
        return BundleCorrupt(f"{self._archive}: {said}. {_AGAIN}")

    def write(self, name: str, size: int, file: IO[bytes]) -> None:
        """Write `size` bytes as the content of a file."""
        self._admit(name, size)
        path = self._into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        left = size
        with path.open("xb") as written:
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise self.problem(f"{name} ends after {size - left} of {size} bytes")
                written.write(chunk)
                left -= len(chunk)

    def _admit(self, name: str, size: int) -> None:
        reason = unsafe_name(name)
        if reason is not None:
            raise self.problem(f"it holds a file {name[:100]!r}, {reason}")
        if len(self._names) >= _MOST_FILES:
            raise self.problem(f"it holds more than {_MOST_FILES:,} files")
        if not 0 <= size <= self._left:
            raise self.problem(f"with {name} ({size:,} bytes) it holds more than the {self._most:,} bytes it may")
        self._left -= size
        folded = name.casefold()
        parts = folded.split("/")
        parents = {"/".join(parts[:count]) for count in range(1, len(parts))}
        if folded in self._names or folded in self._parents or parents & self._names:
            raise self.problem(f"it holds {name} twice, or as a file and as a folder")
        self._names.add(folded)
        self._parents |= parents
        self._tops.add(name.partition("/")[0])

    def folder(self) -> Path:
        """Give the one top folder of all files."""
        if len(self._tops) != 1 or not (self._into / next(iter(self._tops))).is_dir():
            raise self.problem(f"it holds {len(self._tops)} things at its top; one folder is needed")
        return self._into / next(iter(self._tops))


def _unpack_tar(file: IO[bytes], target: _Target) -> None:
    """Read a tar file header by header; `tarfile` itself would read extension headers of any size."""
    zstandard = import_zstandard()
    reader = io.BufferedReader(
        zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).stream_reader(file, closefd=False), _CHUNK
    )
    try:
        blocks = 1
        for entry in _headers(reader, target):
            target.write(entry.name, entry.size, reader)
            padding = -entry.size % _BLOCK
            if reader.read(padding) != bytes(padding):
                raise target.problem(f"what fills {entry.name} up is not zero")
            blocks += 1 + (entry.size + padding) // _BLOCK
        rest = -blocks * _BLOCK % tarfile.RECORDSIZE or tarfile.RECORDSIZE
        if reader.read(rest + 1) != bytes(rest):  # at least one more block of zeros, and no byte behind the last record
            raise target.problem("its end is cut off, or there is more behind it")
    except zstandard.ZstdError as error:
        raise target.problem(f"cannot be decompressed ({error})") from error


def _headers(reader: IO[bytes], target: _Target) -> Iterator[tarfile.TarInfo]:
    """Give each header; the caller reads the content before it asks for the next."""
    while True:
        block = reader.read(_BLOCK)
        if block == bytes(_BLOCK):
            return
        try:
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:  # a name that is no UTF-8 is a ValueError
            raise target.problem(f"a header of the tar file is damaged ({error})") from error
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}.get(entry.type)
            kind = kind or f"no plain file (type {entry.type!r})"
            raise target.problem(f"it holds {entry.name[:100]!r}, which is {kind}")
        yield entry


def _unpack_zip(file: IO[bytes], size: int, target: _Target) -> None:
    """Read a zip file entry by entry."""
    _require_small_directory(file, size, target)
    with _zip_errors(target), zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            mode = entry.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or entry.is_dir():
                raise target.problem(f"it holds {entry.filename[:100]!r}, which is no plain file (mode {mode:o})")
            if entry.flag_bits & 0x1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise target.problem(f"{entry.filename[:100]!r} is encrypted or compressed in an unknown way")
            if entry.orig_filename != entry.filename:
                raise target.problem(f"it holds a file {entry.orig_filename[:100]!r}, whose name is cut at a zero")
            with archive.open(entry) as content:
                target.write(entry.filename, entry.file_size, content)
                if content.read(1):  # `zipfile` compares the checksum when the end is read
                    raise target.problem(f"{entry.filename} is longer than it says")


def _require_small_directory(file: IO[bytes], size: int, target: _Target) -> None:
    """Check the size of a zip file's directory before `zipfile` reads all of it."""
    file.seek(max(0, size - _ZIP_END.size))
    tail = file.read(_ZIP_END.size)
    file.seek(0)
    if len(tail) < _ZIP_END.size or tail[:4] != b"PK\x05\x06":
        raise target.problem("the zip file is cut off, or has a comment")
    count, directory_bytes = _ZIP_END.unpack(tail)[4:6]
    if count > _MOST_FILES or directory_bytes > _DIRECTORY_BYTES:
        raise target.problem(f"it says it holds {count:,} files; at most {_MOST_FILES:,} may be there")


@contextmanager
def _zip_errors(target: _Target) -> Iterator[None]:
    """Turn errors of `zipfile` into `BundleCorrupt`."""
    try:
        yield
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ValueError, RuntimeError
    ) as error:  # fmt: skip
        raise target.problem(f"the zip file is damaged ({error})") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a negative offset; any other error is the disk's
            raise
        raise target.problem("the zip file is damaged: it points before its own beginning") from error
