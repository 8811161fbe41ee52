"""Find the FP32 model that a bundle was made from: the bundle names its sha256 and does not contain it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgeq.errors import ConfigError
from edgeq.records import FileRef, Manifest
from edgeq.system.files import sha256_file


def float_model(manifest: Manifest, against: Path | None, cache: Path) -> Path:
    """Give the path of the float model, checked by its sha256.

    Args:
        manifest: of the bundle.
        against: a file named by the user; None searches the cache.
        cache: the cache's folder.

    Raises:
        ConfigError: the named file is another model, or the cache does not hold it.
    """
    wanted = manifest.float_model.file
    if against is not None:
        if not against.is_file():
            raise ConfigError(f"{against}: no such file; the bundle's float model is needed. Check the path.")
        if not _has_content(against, wanted):
            raise ConfigError(
                f"{against}: is not the float model that the bundle of {manifest.target.name} was made from, which has "
                f"{wanted.size_bytes} bytes and sha256 {wanted.sha256}. Give that one, or leave --against out."
            )
        return against
    found = cached(wanted, cache)
    if found is None:
        raise ConfigError(
            f"the cache does not hold the FP32 model (sha256 {wanted.sha256[:12]}...) that the bundle of "
            f"{manifest.target.name} was made from and is compared with. Run the export again without --no-cache, "
            "or give the file with --against."
        )
    return found


def cached(wanted: FileRef, cache: Path) -> Path | None:
    """Give the path of the file with this content in the cache, or None."""
    suffix = Path(wanted.path).suffix
    return _search(cache.rglob(f"*{suffix}") if cache.is_dir() else (), wanted)


def _search(files: Iterable[Path], wanted: FileRef) -> Path | None:
    """Give the first file with the wanted size and sha256, or None."""
    return next((file for file in sorted(files) if _has_content(file, wanted)), None)


def _has_content(file: Path, wanted: FileRef) -> bool:
    """Compare a file's size, then its sha256."""
    return file.is_file() and file.stat().st_size == wanted.size_bytes and sha256_file(file) == wanted.sha256
