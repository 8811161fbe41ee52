"""Make a release folder: judge the bundles, pack each, and write notes, bills of materials, provenance, signatures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgeq.bundle.checksums import SUMS, check_sums, write_sums
from edgeq.errors import BundleCorrupt, ConfigError, ReleaseRefused
from edgeq.records import FileRef, Record
from edgeq.release import pack, provenance, sbom, sign
from edgeq.release.archives import read_archive
from edgeq.release.eligibility import Candidate, examine, find_bundles
from edgeq.release.notes import NOTES, Packed, release_notes
from edgeq.system.files import file_ref, replacing_dir, storage_errors
from edgeq.system.progress import Progress, silent
from edgeq.version import VERSION

_VERSION = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", re.ASCII)
_FORMATS = ("tar.zst", "zip")


class Release(Record):
    """Describe a release folder."""

    path: str
    version: str
    archives: tuple[FileRef, ...]  # paths are relative to `path`
    is_signed: bool
    is_new: bool  # False when the same release existed already


def release(
    given: Sequence[Path],
    version: str,
    to: Path,
    *,
    archive_format: pack.ArchiveFormat = "tar.zst",
    previous: Path | None = None,
    key: Path | None = None,
    model_licence: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Release:
    """Write a release; equal bundles, version and tools give equal bytes, and a killed run leaves no release.

    Args:
        given: bundles, or folders of bundles.
        version: X.Y.Z, as semantic versioning spells it.
        to: the folder to write.
        archive_format: of the archives.
        previous: the folder of the previous release, for the comparison in the notes.
        key: the file of the secret key; None reads the variable EDGEQ_RELEASE_KEY, and without it signs nothing.
        model_licence: of the model, as an SPDX expression, for the bill of materials.
        overwrite: replace another release at `to`.
        progress: called as `progress(stage, done, total)`.

    Raises:
        ReleaseRefused: a bundle may not be released; the message gives every reason.
        ConfigError: an argument is wrong, or `to` holds no release or another one.
        BundleCorrupt: the previous release, or the same release at `to`, is damaged.
        StorageFailed: the disk refuses.
        ToolMissing: something of the extra `release` is not installed.
    """
    _require_arguments(version, archive_format, to)
    signer = sign.read_signer(key)
    packer = pack.compressor(archive_format)
    before = None if previous is None else read_release(previous)
    candidates = _fit(find_bundles(given))
    names = [archive_name(each, version, archive_format) for each in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)}: two bundles would have this name. Release them apart.")
    with storage_errors(f"writing the release {to}"), replacing_dir(to) as partial:
        packed = []
        for number, (candidate, name) in enumerate(zip(candidates, names, strict=True)):
            progress("pack", number, len(candidates))
            pack.pack(candidate.path, partial / name, archive_format)
            packed.append(Packed(candidate, file_ref(partial / name, partial)))
        progress("pack", len(candidates), len(candidates))
        _describe(partial, packed, version, archive_format, packer, model_licence)
        notes = release_notes(version, packed, before, signer.public.text() if signer else None)
        (partial / NOTES).write_text(notes, encoding="utf-8", newline="\n")
        _seal(partial, [each.archive.path for each in packed], signer)
        is_same = (to / SUMS).is_file() and (to / SUMS).read_bytes() == (partial / SUMS).read_bytes()
        if (to / SUMS).is_file() and not overwrite:
            _require_same(to, is_same)
    archives = tuple(each.archive for each in packed)
    return Release(path=str(to), version=version, archives=archives, is_signed=signer is not None, is_new=not is_same)


def archive_name(candidate: Candidate, version: str, archive_format: pack.ArchiveFormat) -> str:
    """Name the archive by model, version and target, in characters that every file system allows."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", candidate.manifest.source.name.rpartition("/")[2]).strip("-.") or "model"
    return f"{model[:100]}-{version}-{candidate.manifest.target.name}.{archive_format}"


def read_release(folder: Path) -> tuple[Packed, ...]:
    """Read the records of every archive of a release.

    Raises:
        ConfigError: the folder holds no release.
        BundleCorrupt: a file is damaged.
    """
    archives = [path for archive_format in _FORMATS for path in sorted(folder.glob(f"*.{archive_format}"))]
    if not (folder / SUMS).is_file() or not archives:
        raise ConfigError(f"{folder}: no release; a folder that `edgeq release` wrote is needed. Check the path.")
    _check(folder)
    return tuple(read_archive(path) for path in archives)


def _require_arguments(version: str, archive_format: str, to: Path) -> None:
    """Refuse a wrong version, format or folder before any bundle is read."""
    if not _VERSION.fullmatch(version):
        raise ConfigError(f'--version is "{version}"; X.Y.Z is needed, as semantic versioning spells it (1.0.0).')
    if archive_format not in _FORMATS:
        raise ConfigError(f'--format is "{archive_format}"; {" or ".join(_FORMATS)} is needed.')
    if to.exists() and not (to / SUMS).is_file() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: is there and is no release of edgeq, so it is left alone. Give another --to.")
    if (to / "manifest.json").exists():
        raise ConfigError(f"{to}: is a bundle, and would be replaced by a release. Give another --to.")


def _fit(paths: Sequence[Path]) -> tuple[Candidate, ...]:
    """Give the bundles if all may be released, else raise with every reason."""
    examined = [examine(path) for path in paths]
    reasons = [reason for _, against in examined for reason in against]
    if reasons:
        bad = sum(1 for _, against in examined if against)
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise ReleaseRefused(f"nothing is released: {bad} of {len(paths)} bundles are not fit:\n{lines}")
    return tuple(candidate for candidate, _ in examined if candidate is not None)


def _describe(
    folder: Path,
    packed: Sequence[Packed],
    version: str,
    archive_format: pack.ArchiveFormat,
    packer: dict[str, str],
    model_licence: str | None,
) -> None:
    """Write bill of materials, provenance and device reports beside each archive."""
    for each in packed:
        stem = each.archive.path.removesuffix(f".{archive_format}")
        for name, device in each.candidate.devices.items():
            (folder / f"{stem}.{name}").write_bytes((device.model_dump_json(indent=2) + "\n").encode())
        bill = sbom.sbom(each.candidate, version, each.archive, model_licence)
        (folder / f"{stem}{sbom.SUFFIX}").write_bytes(bill)
        said = provenance.provenance(each.candidate, version, each.archive, packer, VERSION)
        (folder / f"{stem}{provenance.SUFFIX}").write_bytes(said)


def _seal(folder: Path, archives: Sequence[str], signer: sign.Signer | None) -> None:
    """Sign the archives, write SHA256SUMS over every file, and sign it."""
    if signer is not None:
        for name in archives:
            signer.sign(folder / name)
    write_sums(folder)
    if signer is not None:
        signer.sign(folder / SUMS)


def _check(folder: Path) -> None:
    """Compare every file of a release with SHA256SUMS, except the signature of SHA256SUMS."""
    check_sums(folder, apart=(SUMS + sign.SUFFIX,))


def _require_same(to: Path, is_same: bool) -> None:
    """Refuse to replace another release, or a damaged one, without --overwrite."""
    if not is_same:
        raise ConfigError(f"{to}: holds another release. Give --overwrite to replace it, or another --to.")
    try:
        _check(to)
    except BundleCorrupt as error:
        raise BundleCorrupt(f"{error} Or give --overwrite to make the release again.") from error
