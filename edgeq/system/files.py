"""Hash files, and write files and folders so that a killed run leaves no half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

from edgeq.errors import StorageFailed
from edgeq.records import FileRef

PREFIX = "edgeq-"  # begins the names of all temporary folders
_OWNER, _CONTENT = ".edgeq-owner", "work"  # in a temporary folder: the file that its process has locked, and its use

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose another folder or change its permissions",
    errno.EPERM: "permission denied; choose another folder or change its permissions",
    errno.ENOENT: "the folder is not there; make it, or choose another",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EIO: "the disk reports an error; check it",
}


def sha256_file(path: Path) -> str:
    """Give the sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_ref(path: Path, relative_to: Path | None = None) -> FileRef:
    """Name a file by path, content and size; the path is relative in POSIX form when a folder is given."""
    name = path.relative_to(relative_to).as_posix() if relative_to is not None else str(path)
    return FileRef(path=name, sha256=sha256_file(path), size_bytes=path.stat().st_size)


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError about storage into a StorageFailed of one sentence.

    Raises:
        StorageFailed: the disk is full, read-only, not there or not permitted.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise StorageFailed(f"{what}{where}: {reason}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` at the end, or remove it when anything goes wrong.

    Raises:
        StorageFailed: the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with storage_errors(f"writing {path}"):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; let it take the place of `path` at the end, or remove it.

    A folder that is at `path` is moved aside first and removed last, so that a whole one always exists. Temporary
    folders of killed processes are removed, and a folder that one of them had moved aside is moved back. Of two
    processes that write `path` at once the last wins.

    Raises:
        StorageFailed: the disk refuses.
    """
    with storage_errors(f"writing {path}"), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            _sweep(path)
            partial = stack.enter_context(_held_sibling(path, ".partial"))
        partial.chmod(0o755)
        yield partial
        with _alone(path.parent):
            if path.exists():
                aside = stack.enter_context(_held_sibling(path, ".replaced"))
                path.rename(aside / path.name)
                stack.callback(_put_back, aside, path)
            partial.rename(path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, so that one process at a time changes names in it through this module."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, fcntl.LOCK_EX)
        yield
    finally:
        _lock(handle, fcntl.LOCK_UN)  # closing alone would not: a forked child may hold the handle, too
        os.close(handle)


def _lock(handle: int, operation: int) -> bool:
    """Change the lock of an open folder; return False where another process has it, or the file system has no locks."""
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return False
    return True


@contextlib.contextmanager
def _held_sibling(path: Path, suffix: str) -> Iterator[Path]:
    """Make a folder beside `path` and hold its lock until the end or the process's death; remove the folder then."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent))
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove temporary siblings of `path` whose lock nobody holds; first move back a folder that was moved aside."""
    for folder in sorted(path.parent.glob(f".{glob.escape(path.name)}.*")):
        if folder.suffix not in (".partial", ".replaced") or not folder.is_dir():
            continue
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the process that made it removes it at this moment, without the lock of the parent
            continue
        try:
            if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):  # else the process that made it lives
                _put_back(folder, path)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _put_back(aside: Path, path: Path) -> None:
    """Move the folder that was moved aside back to `path`, unless another is there now."""
    if aside.suffix == ".replaced" and not path.exists() and (aside / path.name).exists():
        (aside / path.name).rename(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageFailed: the disk refuses.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


class TemporaryFolder:
    """Make a folder in the temporary directory, and hold a lock in it that the kernel frees when this process ends.

    Folders whose process died without removing them, by `kill -9` or for want of memory, are removed first.
    """

    def __init__(self, prefix: str) -> None:
        """Make a folder.

        Args:
            prefix: begins its name.
        """
        parent = Path(tempfile.gettempdir())
        sweep_temporary(parent)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        handle = _lock_inside(folder)
        self.path = folder / _CONTENT
        self.path.mkdir()
        self._end = weakref.finalize(self, _remove, folder, handle, os.getpid())

    def close(self) -> None:
        """Remove the folder; it is removed when this object is, too, and at the end of the process."""
        self._end()


def _lock_inside(folder: Path) -> int:
    """Put a locked file into a folder; it has its own name only once it is locked, so that no sweep can come between.

    Returns:
        The handle of the open file.
    """
    new = folder / f"{_OWNER}.new"
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(folder / _OWNER)
    return handle


def _remove(folder: Path, handle: int, process: int) -> None:
    """Remove a temporary folder; a fork of the process that made it leaves it alone."""
    if os.getpid() == process:
        _empty_and_remove(folder)
    os.close(handle)


def _empty_and_remove(folder: Path) -> None:
    """Remove a temporary folder, its mark last: what is left when this is stopped, too, the next sweep removes."""
    shutil.rmtree(folder / _CONTENT, ignore_errors=True)
    if not (folder / _CONTENT).exists():
        shutil.rmtree(folder, ignore_errors=True)


def sweep_temporary(parent: Path) -> None:
    """Remove the temporary folders of dead processes of this user; what is not known to be one of them stays.

    Such a folder is a real one, not a link, belongs to this user, and holds a file of ours that nobody has locked.

    Args:
        parent: the temporary directory.
    """
    try:
        found = [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for folder in sorted(found):
        with contextlib.suppress(OSError):  # another process removes it at this moment, or it is not ours to open
            _remove_if_dead(folder)


def _remove_if_dead(folder: Path) -> None:
    """Remove one temporary folder of this user if the lock in it is free.

    Raises:
        OSError: it cannot be opened, is a link or no folder, or holds no file of ours.
    """
    with contextlib.ExitStack() as stack:
        inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        stack.callback(os.close, inside)
        handle = os.open(_OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=inside)
        stack.callback(os.close, handle)
        held = os.fstat(handle)
        if not stat.S_ISREG(held.st_mode) or {held.st_uid, os.fstat(inside).st_uid} != {os.geteuid()}:
            return
        if not _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return
        # The name may stand for a newer folder by now: what is removed is the one whose lock is held.
        if os.path.samestat(folder.stat(follow_symlinks=False), os.fstat(inside)):
            _empty_and_remove(folder)


@contextlib.contextmanager
def work_dir(prefix: str = PREFIX) -> Iterator[Path]:
    """Yield an empty temporary folder, and remove it afterwards; the next one removes it if this process is killed.

    Args:
        prefix: begins its name.

    Raises:
        StorageFailed: the disk refuses.
    """
    with storage_errors("working in a temporary folder"):
        folder = TemporaryFolder(prefix)
        try:
            yield folder.path
        finally:
            folder.close()
