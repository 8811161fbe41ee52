"""Open a release archive: check its signature, and read and verify the bundle in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeq.bundle.verify import Verification, read_whole, verify
from edgeq.devices.report import REPORT, read_report
from edgeq.errors import ConfigError, EdgeqError
from edgeq.release import sign
from edgeq.release.eligibility import Candidate
from edgeq.release.notes import Packed
from edgeq.release.unpack import unpack
from edgeq.system.files import file_ref, work_dir


def verify_archive(archive: Path, public_key: Path | None) -> Verification:
    """Check an archive's signature, if a public key is given, unpack it to a temporary folder, and verify the bundle.

    Raises:
        ConfigError: there is no such file, or the public key is not valid.
        BundleCorrupt: the signature does not match, or the archive or the bundle is damaged.
        StorageFailed: the disk refuses.
        ToolMissing: the package for its compression or signature is not installed.
        EdgeqError: any other failure of `bundle.verify`.
    """
    if not archive.is_file():
        raise ConfigError(f"{archive}: no such file; an archive of `edgeq release` is needed. Check the path.")
    if public_key is not None:
        sign.check(archive, sign.read_public_key(public_key))
    with _unpacked(archive) as folder:
        return verify(folder).model_copy(update={"path": str(archive)})


def read_archive(archive: Path) -> Packed:
    """Read and check the records of the bundle in an archive, and the device reports beside the archive.

    Raises:
        BundleCorrupt: the archive or the bundle is damaged.
    """
    with _unpacked(archive) as folder:
        manifest, report = read_whole(folder)
        start = f"{folder.name}."
        devices = {
            path.name.removeprefix(start): read_report(path, folder)
            for path in sorted(archive.parent.glob(f"*{REPORT}")) if path.name.startswith(start)
        }  # fmt: skip
        return Packed(Candidate(archive, manifest, report, devices), file_ref(archive, archive.parent))


@contextmanager
def _unpacked(archive: Path) -> Iterator[Path]:
    """Unpack an archive to a temporary folder; messages name the archive instead of this folder."""
    with work_dir() as folder:
        try:
            yield unpack(archive, folder)
        except EdgeqError as error:
            said = str(error).replace(f"{folder}/", f"{archive}:")
            raise type(error)(said) from error
