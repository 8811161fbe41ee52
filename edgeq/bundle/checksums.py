"""Write and check SHA256SUMS, in the format of `sha256sum -c`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgeq.errors import BundleCorrupt, EdgeqError
from edgeq.system.files import sha256_file
from edgeq.system.untrusted import oversize

SUMS = "SHA256SUMS"
_AGAIN = "Fetch or export the bundle again."
_MOST_BYTES = 16 << 20
_LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n\r]+)")
# One changed byte of SHA256SUMS changes one digit of a sum; one changed byte of a file changes about 60 of the 64.
_DIGITS_OF_A_DAMAGED_LINE = 8


def bundle_files(directory: Path) -> dict[str, Path]:
    """List every file of a bundle except SHA256SUMS, by POSIX path, sorted."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    found.pop(SUMS, None)
    return dict(sorted(found.items()))


def write_sums(directory: Path) -> None:
    """Hash every file of a bundle, and write SHA256SUMS.

    Raises:
        EdgeqError: a file name holds a backslash or a line break, which SHA256SUMS would have to escape.
    """
    lines = [f"{sha256_file(path)}  {name}" for name, path in bundle_files(directory).items()]
    bad = [line for line in lines if not _LINE.fullmatch(line)]
    if bad:
        raise EdgeqError(f"{directory}: file name {bad[0][66:]!r} cannot stand in {SUMS}. Rename it in the model.")
    (directory / SUMS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def check_sums(directory: Path, apart: Sequence[str] = ()) -> int:
    """Hash every file and compare it with SHA256SUMS.

    Args:
        directory: of a bundle or a release.
        apart: files that may exist without being listed, such as a signature of SHA256SUMS.

    Returns:
        The number of files with the listed hash, SHA256SUMS not counted.

    Raises:
        BundleCorrupt: a file is changed, missing, not listed, or no regular file; the message names each.
    """
    _require_plain(directory)
    listed = _read_sums(directory / SUMS)
    found = {name: path for name, path in bundle_files(directory).items() if name not in apart}
    problems = [f"{name}: is listed in {SUMS} but not there" for name in listed if name not in found]
    problems += [f"{name}: is there but not listed in {SUMS}" for name in found if name not in listed]
    for name in listed.keys() & found.keys():
        problem = _difference(name, found[name], listed[name])
        if problem is not None:
            problems.append(problem)
    if problems:
        raise BundleCorrupt(f"{directory}: {'; '.join(sorted(problems))}. {_AGAIN}")
    return len(found)


def _require_plain(directory: Path) -> None:
    """Refuse links, which may lead out of the bundle, and pipes and devices, whose reading may never end."""
    odd = [path for path in directory.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
    if odd:
        names = ", ".join(sorted(path.relative_to(directory).as_posix() for path in odd[:5]))
        raise BundleCorrupt(f"{directory}: {names}: no plain file but a link or a device. Fetch the files themselves.")


def _difference(name: str, path: Path, listed: str) -> str | None:
    """Say whether a file or its line in SHA256SUMS is damaged; None where both agree."""
    try:
        found = sha256_file(path)
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    if found == listed:
        return None
    digits = sum(a != b for a, b in zip(found, listed, strict=True))
    if digits <= _DIGITS_OF_A_DAMAGED_LINE:
        return f"{SUMS}: the sum of {name} is damaged in {digits} digits; the file itself is whole"
    return f"{name}: its sha256 is {found}; {SUMS} says {listed}"


def _read_sums(path: Path) -> dict[str, str]:
    """Read SHA256SUMS as file name -> hash."""
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise BundleCorrupt(f"{path}: {reason}. {_AGAIN}")
    try:
        content = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise BundleCorrupt(f"{path}: is not there, so no file can be checked. {_AGAIN}") from error
    except UnicodeDecodeError as error:
        raise BundleCorrupt(f"{path}: not UTF-8 ({error}). {_AGAIN}") from error
    lines = content.split("\n")
    if lines.pop() != "":
        raise BundleCorrupt(f"{path}: its last line does not end. {_AGAIN}")
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise BundleCorrupt(
                f"{path}:{number}: is damaged: {line[:100]!r}; a sum, two spaces and a name are needed. {_AGAIN}"
            )
        sums[match[2]] = match[1]
    return sums
