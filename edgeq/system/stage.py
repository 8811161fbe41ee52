"""Define a stage whose results are cached: it is given one frozen request, and that request alone makes the key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from edgeq.errors import ConfigError
from edgeq.records import FileRef, Record
from edgeq.system.files import file_ref
from edgeq.system.made_by import MadeBy
from edgeq.system.progress import Progress

_REPLACED = "or was replaced, while it was read: the result would be kept under the old content. Run the command again"


class InputFile(Record):
    """Name a file that a stage reads, by its place in the folder that the stage is given."""

    name: str  # relative to that folder, in POSIX notation
    file: FileRef


class Request(Record):
    """Hold everything that decides a stage's result; each stage has a request of its own, with further fields."""

    made_by: MadeBy


RequestT = TypeVar("RequestT", bound=Request)


@dataclass(frozen=True)
class Stage(Generic[RequestT]):
    """Describe a stage whose results are cached.

    Attributes:
        kind: under which `edgeq cache` lists its entries.
        request: the class of its requests.
        make: `make(request, folder, progress)` writes the result into an empty folder. It reads its request and the
            files that the request names, nothing else: no option, variable, global state or other file.
    """

    kind: str
    request: type[RequestT]
    make: Callable[[RequestT, Path, Progress], None]


def key(request: Request) -> str:
    """Hash a request, every field of it, to the name of its entry; where its files lie does not count."""
    named = {"request": type(request).__name__, "content": content(request)}
    return hashlib.sha256(json.dumps(named, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def content(value: object) -> object:
    """Give a value as JSON has it, with the content of files in place of their paths.

    Raises:
        TypeError: it holds something whose content this function does not know.
    """
    if isinstance(value, FileRef):
        return {"sha256": value.sha256, "size_bytes": value.size_bytes}
    fields = _fields(value)
    if fields is not None:
        return {name: content(item) for name, item in fields.items() if not isinstance(item, Path)}
    if isinstance(value, tuple | list):
        return [content(item) for item in value]
    if isinstance(value, dict):
        return {str(name): content(item) for name, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a request holds a {type(value).__name__}, whose content no key can hold")


def files_of(value: object) -> Iterator[FileRef]:
    """List the files that a request names, however deep."""
    if isinstance(value, FileRef):
        yield value
        return
    fields = _fields(value)
    items = fields.values() if fields is not None else value if isinstance(value, tuple | list) else ()
    for item in items:
        yield from files_of(item)


def require_unchanged(request: Request) -> None:
    """Hash the files of a request again, after a stage has read them.

    Raises:
        ConfigError: one of them changed meanwhile.
    """
    for ref in files_of(request):
        path = Path(ref.path)
        if not path.is_file() or file_ref(path).sha256 != ref.sha256:
            raise ConfigError(f"{path}: was changed, {_REPLACED}.")


def input_files(folder: Path) -> tuple[InputFile, ...]:
    """Name every file below a folder, sorted by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(input_file(path, path.relative_to(folder).as_posix()) for path in paths)


def input_file(path: Path, name: str) -> InputFile:
    """Name one file, and hash it."""
    return InputFile(name=name, file=file_ref(path))


def folder_of(files: Sequence[InputFile]) -> Path:
    """Give the folder below which files lie under their names.

    Raises:
        ValueError: there is none, or they do not lie below one folder.
    """
    folders = set()
    for item in files:
        path = Path(item.file.path)
        folder = path.parents[len(PurePosixPath(item.name).parts) - 1]
        if path != folder / item.name:
            raise ValueError(f"{path}: does not end in {item.name}")
        folders.add(folder)
    (folder,) = folders
    return folder


def linked(files: Sequence[InputFile], folder: Path) -> None:
    """Fill a folder with links to files under their names: what reads it finds these files and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in files:
        link = folder / item.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(item.file.path).absolute())


def _fields(value: object) -> dict[str, object] | None:
    """Give the fields of a record or a dataclass by name; None for anything else."""
    if isinstance(value, Record):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return None
