"""Pack a bundle into one archive: the same files give the same bytes, on every machine with the same compressor."""

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

Form = Literal["tar.zst", "zip"]

# Weights in 8 bits hardly shrink: zstd's level 19 saves 0.1 % of a bundle over level 10 and takes 70 times as long.
LEVELS: dict[Form, int] = {"tar.zst": 10, "zip": 9}
_MODE = 0o644
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can hold; a tar file gets zero
_INSTALL = "install: pip install 'edgeq[release]'"


def pack(bundle: Path, archive: Path, form: Form) -> None:
    """Write the archive of a bundle, its files below one folder of the archive's own name, sorted.

    Args:
        bundle: OUT/TARGET.
        archive: ends with the form.
        form: which kind of archive.

    Raises:
        ConfigError: a path is too long for the archive.
        StorageFailed: the disk refuses.
        ToolMissing: the compressor is not installed.
    """
    top = archive.name.removesuffix(f".{form}")
    files = {f"{top}/{name}": path for name, path in bundle_files(bundle).items()}
    files[f"{top}/{SUMS}"] = bundle / SUMS
    ordered = dict(sorted(files.items()))
    with replacing(archive) as partial:
        if form == "zip":
            _write_zip(ordered, partial)
        else:
            _write_tar(ordered, partial)


def compressor(form: Form) -> dict[str, str]:
    """Name what compresses, its version and its level: other ones give other bytes.

    Raises:
        ToolMissing: the compressor is not installed.
    """
    level = str(LEVELS[form])
    if form == "zip":
        return {"zlib": zlib.ZLIB_RUNTIME_VERSION, "level": level}
    zstandard = import_zstandard()
    return {"zstd": ".".join(str(part) for part in zstandard.ZSTD_VERSION), "level": level}


def import_zstandard() -> Any:
    """Give the module that knows zstd.

    Raises:
        ToolMissing: it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ToolMissing(f"archives of the form tar.zst need zstandard ({error}); {_INSTALL}") from error
    return zstandard


def _write_tar(files: dict[str, Path], place: Path) -> None:
    """Write a compressed tar file of the oldest form, which holds no extensions that a reader must trust."""
    zstandard = import_zstandard()
    # One thread: with more, the bytes depend on how many there are.
    packer = zstandard.ZstdCompressor(level=LEVELS["tar.zst"], threads=0, write_checksum=True)
    with place.open("wb") as raw, packer.stream_writer(raw, closefd=False) as packed:
        with tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT, encoding="utf-8") as archive:
            for name, path in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode, entry.mtime = path.stat().st_size, _MODE, 0
                try:
                    with path.open("rb") as file:
                        archive.addfile(entry, file)
                except ValueError as error:
                    raise ConfigError(
                        f"{path}: does not fit into a tar file ({error}); give --format zip, or a shorter name."
                    ) from error


def _write_zip(files: dict[str, Path], place: Path) -> None:
    """Write a zip file without time stamps."""
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVELS["zip"]) as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # the zip module writes the system it runs on
            entry.external_attr = (0o100000 | _MODE) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.file_size = path.stat().st_size  # decides whether the entry needs 64 bits
            with path.open("rb") as file, archive.open(entry, "w") as packed:
                shutil.copyfileobj(file, packed, 1 << 20)
