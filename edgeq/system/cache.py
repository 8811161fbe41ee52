"""Keep intermediate results in folders whose names are hashes of everything that they were made from."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from edgeq.system import memory
from edgeq.system.files import PREFIX, TemporaryFolder, replacing_dir, sha256_file, storage_errors
from edgeq.system.progress import Progress, silent
from edgeq.system.stage import RequestT, Stage, key, require_unchanged

LOCATION_VARIABLE = "EDGEQ_CACHE_DIR"
_INDEX = "SHA256SUMS"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """Describe one entry: its kind, key, folder and size."""

    kind: str
    key: str
    path: Path
    size_bytes: int


class Cache:
    """Hold entries, each a folder of files with an index of their hashes."""

    def __init__(self, root: Path | None = None) -> None:
        """Use the folder `root`; None uses the one that EDGEQ_CACHE_DIR names, or else the user's cache directory."""
        named = os.environ.get(LOCATION_VARIABLE)
        self.root = root or (Path(named) if named else platformdirs.user_cache_path("edgeq", appauthor=False))
        self._temporary: TemporaryFolder | None = None

    @classmethod
    def temporary(cls) -> Cache:
        """Make a cache that is removed when it is closed or garbage-collected."""
        with storage_errors("making a temporary cache"):
            folder = TemporaryFolder(f"{PREFIX}cache-")
        cache = cls(folder.path)
        cache._temporary = folder
        return cache

    @property
    def is_temporary(self) -> bool:
        """Tell whether the cache is removed when it is closed."""
        return self._temporary is not None

    def close(self) -> None:
        """Remove a temporary cache; keep any other."""
        if self._temporary is not None:
            self._temporary.close()

    def result(self, stage: Stage[RequestT], request: RequestT, progress: Progress = silent) -> Path:
        """Give the folder with a stage's result for a request; run the stage first if it is not there or damaged.

        Raises:
            ConfigError: a file that the request names changed while the stage read it.
            StorageFailed: the cache cannot be written.
            EdgeqError: whatever the stage raises.
        """

        def make(folder: Path) -> None:
            stage.make(request, folder, progress)
            memory.trim()
            require_unchanged(request)

        return self.entry(stage.kind, key(request), make)

    def holds(self, stage: Stage[RequestT], request: RequestT) -> bool:
        """Tell whether a stage's result for a request is there; whether it is damaged only `result` finds out."""
        return (self.root / stage.kind / key(request)).is_dir()

    def entry(self, kind: str, name: str, make: Callable[[Path], None]) -> Path:
        """Give the folder of an entry; make the entry first if it is not there or damaged.

        Stages go through `result`, which makes their keys. Two processes that want the same entry at once wait for each
        other. A killed `make` leaves nothing behind.

        Args:
            kind: of the entry, e.g. "calibration".
            name: of the entry: the key of all that decides its content.
            make: writes the entry's files into an empty folder.

        Raises:
            StorageFailed: the cache cannot be written.
        """
        folder = self.root / kind / name
        with storage_errors(f"the cache {self.root}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_suffix(".lock"))
            lock.acquire()
        try:
            if folder.is_dir():
                problem = _damage(folder)
                if problem is None:
                    return folder
                _log.warning("the cache entry %s/%s is damaged (%s); it is made again", kind, name[:12], problem)
                shutil.rmtree(folder)
            with replacing_dir(folder) as partial:
                make(partial)
                _write_index(partial)
        finally:
            lock.release()
        return folder

    def entries(self) -> Iterator[_Entry]:
        """List every entry, sorted by kind and key."""
        for kind in sorted(path for path in self.root.glob("*") if path.is_dir()):
            for folder in sorted(path for path in kind.iterdir() if path.is_dir() and not path.name.startswith(".")):
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                yield _Entry(kind.name, folder.name, folder, size)

    def size(self) -> int:
        """Add up the sizes of all entries, in bytes."""
        return sum(entry.size_bytes for entry in self.entries())

    def purge(self, kind: str | None = None) -> int:
        """Remove the entries of one kind, or all, and return their size in bytes.

        Raises:
            StorageFailed: the cache cannot be written.
        """
        freed = 0
        with storage_errors(f"the cache {self.root}"):
            for entry in list(self.entries()):
                if kind is None or entry.kind == kind:
                    with FileLock(entry.path.with_suffix(".lock")):
                        shutil.rmtree(entry.path)
                    freed += entry.size_bytes
        return freed


def log_path(kind: str, target: str, stem: str) -> Path:
    """Give the path for a compiler's log, which stays until the cache is purged; remove an earlier log there.

    Args:
        kind: under which `edgeq cache` lists and purges it.
        target: the name of the target that is compiled for.
        stem: of the log's file name.
    """
    path = Cache().root / kind / target / f"{stem}.log"
    with storage_errors(f"the cache {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    return path


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _INDEX)


def _write_index(folder: Path) -> None:
    lines = [f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    (folder / _INDEX).write_text("".join(lines), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """Say what is wrong with an entry, or None."""
    index = folder / _INDEX
    if not index.is_file():
        return "its index is gone"
    try:
        lines = [line.split("  ", 1) for line in index.read_text(encoding="utf-8").splitlines()]
        listed = {name: digest for digest, name in lines}
    except (ValueError, UnicodeDecodeError):
        return "its index cannot be read"
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if listed.keys() != found.keys():
        return "files are missing or extra"
    changed = [name for name, path in found.items() if sha256_file(path) != listed[name]]
    return f"{changed[0]} has changed" if changed else None
