"""Pack a bundle into a .tar.zst or .zip archive; equal files and compressor versions give equal bytes."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

from edgeq.bundle.checksums import SUMS, bundle_files
from edgeq.errors import ConfigError, ToolMissing
from edgeq.system.files import replacing

ArchiveFormat = Literal["tar.zst", "zip"]

# int8 weights hardly compress: zstd's level 19 saves 0.1 % of a bundle over level 10 and takes 70 times as long.
LEVELS: dict[ArchiveFormat, int] = {"tar.zst": 10, "zip": 9}
_MODE = 0o644
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can hold; a tar file gets zero
_INSTALL = "install: pip install 'edgeq[release]'"


def pack(bundle: Path, archive: Path, archive_format: ArchiveFormat) -> None:
    """Write the archive of a bundle: its files sorted, in one folder with the archive's name.

    Args:
        bundle: OUT/TARGET.
        archive: the path, which ends with the format.
        archive_format: of the archive.

    Raises:
        ConfigError: a path is too long for the archive.
        StorageFailed: the disk refuses.
        ToolMissing: the compressor is not installed.
    """
    top = archive.name.removesuffix(f".{archive_format}")
    files = {f"{top}/{name}": path for name, path in bundle_files(bundle).items()}
    files[f"{top}/{SUMS}"] = bundle / SUMS
    ordered = dict(sorted(files.items()))
    with replacing(archive) as partial:
        if archive_format == "zip":
            _write_zip(ordered, partial)
        else:
            _write_tar(ordered, partial)


def compressor(archive_format: ArchiveFormat) -> dict[str, str]:
    """Give the compressor's version and level, which decide the archive's bytes.

    Raises:
        ToolMissing: the compressor is not installed.
    """
    level = str(LEVELS[archive_format])
    if archive_format == "zip":
        return {"zlib": zlib.ZLIB_RUNTIME_VERSION, "level": level}
    zstandard = import_zstandard()
    return {"zstd": ".".join(str(part) for part in zstandard.ZSTD_VERSION), "level": level}


def import_zstandard() -> Any:
    """Import zstandard.

    Raises:
        ToolMissing: it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ToolMissing(f"archives in the format tar.zst need zstandard ({error}); {_INSTALL}") from error
    return zstandard


def _write_tar(files: dict[str, Path], path: Path) -> None:
    """Write a compressed tar file in USTAR format, which has no extension headers that a reader would have to trust."""
    zstandard = import_zstandard()
    # One thread: with more, the bytes depend on their number.
    packer = zstandard.ZstdCompressor(level=LEVELS["tar.zst"], threads=0, write_checksum=True)
    with path.open("wb") as raw, packer.stream_writer(raw, closefd=False) as packed:
        with tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
            for name, source in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode, entry.mtime = source.stat().st_size, _MODE, 0
                try:
                    with source.open("rb") as file:
                        archive.addfile(entry, file)
                except ValueError as error:
                    raise ConfigError(
                        f"{source}: does not fit into a tar file ({error}); give --format zip, or a shorter name."
                    ) from error


def _write_zip(files: dict[str, Path], path: Path) -> None:
    """Write a zip file without time stamps."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVELS["zip"]) as archive:
        for name, source in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # `zipfile` would write the present system
            entry.external_attr = (0o100000 | _MODE) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.file_size = source.stat().st_size  # decides whether the entry needs 64 bits
            with source.open("rb") as file, archive.open(entry, "w") as packed:
                shutil.copyfileobj(file, packed, 1 << 20)
