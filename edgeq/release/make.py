"""Make a release: judge every bundle, pack it, and write what belongs beside it."""

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
_FORMS = ("tar.zst", "zip")


class Release(Record):
    """Say what was released."""

    path: str
    version: str
    archives: tuple[FileRef, ...]  # paths are relative to `path`
    is_signed: bool
    is_new: bool  # False when the same release was there already


def release(
    given: Sequence[Path],
    version: str,
    to: Path,
    *,
    form: pack.Form = "tar.zst",
    previous: Path | None = None,
    key: Path | None = None,
    model_licence: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Release:
    """Release bundles. The same bundles, version and tools give the same bytes; a killed run leaves nothing.

    Args:
        given: bundles, or folders that hold some.
        version: X.Y.Z, as semantic versioning spells it.
        to: the folder to write.
        form: of the archives.
        previous: the folder of the release before, which the notes compare with.
        key: the secret key; without one EDGEQ_RELEASE_KEY, if set, holds it, else nothing is signed.
        model_licence: of the model, as an SPDX expression, for the bill of materials.
        overwrite: replace another release at `to`.
        progress: called as `progress(stage, done, total)`.

    Raises:
        ReleaseRefused: a bundle is not fit; the message gives every reason.
        ConfigError: a wrong argument, or something else at `to`.
        BundleCorrupt: the previous release is damaged, or the same release at `to`.
        StorageFailed: the disk refuses.
        ToolMissing: something of the extra `release` is not installed.
    """
    _require_arguments(version, form, to)
    signer = sign.read_signer(key)
    packer = pack.compressor(form)
    before = None if previous is None else read_release(previous)
    candidates = _fit(find_bundles(given))
    names = [archive_name(each, version, form) for each in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)}: two bundles would have this name. Release them apart.")
    with storage_errors(f"writing the release {to}"), replacing_dir(to) as partial:
        packed = []
        for place, (candidate, name) in enumerate(zip(candidates, names, strict=True)):
            progress("pack", place, len(candidates))
            pack.pack(candidate.path, partial / name, form)
            packed.append(Packed(candidate, file_ref(partial / name, partial)))
        progress("pack", len(candidates), len(candidates))
        _describe(partial, packed, version, form, packer, model_licence)
        notes = release_notes(version, packed, before, signer.public.text() if signer else None)
        (partial / NOTES).write_text(notes, encoding="utf-8", newline="\n")
        _seal(partial, [each.archive.path for each in packed], signer)
        is_same = (to / SUMS).is_file() and (to / SUMS).read_bytes() == (partial / SUMS).read_bytes()
        if (to / SUMS).is_file() and not overwrite:
            _require_whole(to, is_same)
    archives = tuple(each.archive for each in packed)
    return Release(path=str(to), version=version, archives=archives, is_signed=signer is not None, is_new=not is_same)


def archive_name(candidate: Candidate, version: str, form: pack.Form) -> str:
    """Name the archive by model, version and target, in letters that every file system takes."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", candidate.manifest.source.name.rpartition("/")[2]).strip("-.") or "model"
    return f"{model[:100]}-{version}-{candidate.manifest.target.name}.{form}"


def read_release(folder: Path) -> tuple[Packed, ...]:
    """Read the records of every archive of a release.

    Raises:
        ConfigError: the folder holds no release.
        BundleCorrupt: a file is damaged.
    """
    archives = [path for form in _FORMS for path in sorted(folder.glob(f"*.{form}"))]
    if not (folder / SUMS).is_file() or not archives:
        raise ConfigError(f"{folder}: no release; a folder that `edgeq release` wrote is needed. Check the path.")
    _check(folder)
    return tuple(read_archive(path) for path in archives)


def _require_arguments(version: str, form: str, to: Path) -> None:
    """Refuse what could not be released anyway, before anything is read."""
    if not _VERSION.fullmatch(version):
        raise ConfigError(f'--version is "{version}"; X.Y.Z is needed, as semantic versioning spells it (1.0.0).')
    if form not in _FORMS:
        raise ConfigError(f'--format is "{form}"; {" or ".join(_FORMS)} is needed.')
    if to.exists() and not (to / SUMS).is_file() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: is there and is no release of edgeq, so it is left alone. Give another --to.")
    if (to / "manifest.json").exists():
        raise ConfigError(f"{to}: is a bundle, and would be replaced by a release. Give another --to.")


def _fit(paths: Sequence[Path]) -> tuple[Candidate, ...]:
    """Give the bundles, if every one is fit."""
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
    form: pack.Form,
    packer: dict[str, str],
    model_licence: str | None,
) -> None:
    """Write the bill of materials, the provenance and the device reports of each archive."""
    for each in packed:
        stem = each.archive.path.removesuffix(f".{form}")
        for name, device in each.candidate.devices.items():
            (folder / f"{stem}.{name}").write_bytes((device.model_dump_json(indent=2) + "\n").encode())
        bill = sbom.sbom(each.candidate, version, each.archive, model_licence)
        (folder / f"{stem}{sbom.SUFFIX}").write_bytes(bill)
        said = provenance.provenance(each.candidate, version, each.archive, packer, VERSION)
        (folder / f"{stem}{provenance.SUFFIX}").write_bytes(said)


def _seal(folder: Path, archives: Sequence[str], signer: sign.Signer | None) -> None:
    """Sign the archives, sum up every file, and sign the sums."""
    if signer is not None:
        for name in archives:
            signer.sign(folder / name)
    write_sums(folder)
    if signer is not None:
        signer.sign(folder / SUMS)


def _check(folder: Path) -> None:
    """Compare every file of a release with its sums, but for the signature of the sums themselves."""
    check_sums(folder, apart=(SUMS + sign.SUFFIX,))


def _require_whole(to: Path, is_same: bool) -> None:
    """Refuse to replace a release by another, or a damaged one without being asked."""
    if not is_same:
        raise ConfigError(f"{to}: holds another release. Give --overwrite to replace it, or another --to.")
    try:
        _check(to)
    except BundleCorrupt as error:
        raise BundleCorrupt(f"{error} Or give --overwrite to make the release again.") from error
