"""Read the texts of an index one after the other, so that memory does not grow with their number."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgeq.errors import ConfigError

_KINDS = (".txt", ".jsonl", ".csv")
_BEIR = ("corpus.jsonl", "corpus.jsonl.gz")


@dataclass(frozen=True)
class TextStream:
    """Read a .txt, .jsonl or .csv file (also .gz), or the corpus of a folder in BEIR layout.

    Attributes:
        path: of the file.
        column: the key or column that holds the text; None means "text".
        is_beir: a text is title and text, and has an id.
    """

    path: Path
    column: str | None
    is_beir: bool = False

    @staticmethod
    def of_file(path: Path, column: str | None) -> TextStream:
        """Take a file of texts.

        Raises:
            ConfigError: it is not there, of another kind, or has no columns.
        """
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; texts come as {', '.join(_KINDS)}, also .gz. Check the path.")
        suffix = _suffix(path)
        if suffix not in _KINDS:
            raise ConfigError(f"{path}: ends in {suffix!r}; {', '.join(_KINDS)}, also .gz, are needed. Rename it.")
        if suffix == ".txt" and column is not None:
            raise ConfigError(f"{path}: a .txt file has no columns. Drop --column {column}.")
        return TextStream(path, column)

    @staticmethod
    def of_beir(folder: Path) -> TextStream:
        """Take the corpus of a folder in BEIR layout.

        Raises:
            ConfigError: it has none.
        """
        found = next((folder / name for name in _BEIR if (folder / name).is_file()), None)
        if found is None:
            raise ConfigError(f"{folder}: {' or '.join(_BEIR)} is not there. Give a folder in BEIR layout.")
        return TextStream(found, None, is_beir=True)

    def sha256(self) -> str:
        """Hash the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Give each record's text and id, blank texts included; a text without an id has its number, from 0.

        Raises:
            ConfigError: a record cannot be read; the message names its line.
        """
        with _opened(self.path) as lines:
            if _suffix(self.path) == ".csv":
                yield from self._rows(lines)
                return
            number = -1
            for line_number, line in enumerate(lines, start=1):
                where = f"{self.path}:{line_number}"
                if _suffix(self.path) == ".txt":
                    number += 1
                    yield line.removesuffix("\n"), str(number)
                elif line.strip():
                    number += 1
                    yield self._of_object(line, where, number)

    def _of_object(self, line: str, where: str, number: int) -> tuple[str, str]:
        """Give text and id of a line of JSON."""
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON ({error}). Repair the line.") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a JSON {type(row).__name__}; an object is needed. Repair the line.")
        name = self.column or "text"
        text, identifier = row.get(name), row.get("_id", number)
        if not isinstance(text, str):
            raise ConfigError(f'{where}: no text under "{name}"; found {", ".join(row)}. Give --column with its key.')
        if self.is_beir and isinstance(row.get("title"), str):
            text = f"{row['title']} {text}".strip()
        return _encodable(text, where), str(identifier)

    def _rows(self, lines: IO[str]) -> Iterator[tuple[str, str]]:
        """Give text and number of each row of a table."""
        name = self.column or "text"
        rows = csv.DictReader(lines, strict=True)
        try:
            if name not in (rows.fieldnames or ()):
                found = ", ".join(rows.fieldnames or ())
                raise ConfigError(f"{self.path}: has no column {name!r}; found {found}. Give --column.")
            for number, row in enumerate(rows):
                if row[name] is None:
                    raise ConfigError(f"{self.path}:{rows.line_num}: the row is too short. Repair it.")
                yield _encodable(row[name], f"{self.path}:{rows.line_num}"), str(number)
        except csv.Error as error:
            raise ConfigError(f"{self.path}:{rows.line_num}: not a table ({error}). Repair the line.") from error


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    r"""Open a UTF-8 file, gzipped or not; lines end at \n, \r\n and \r alone."""
    is_table = _suffix(path) == ".csv"
    newline = "" if is_table else None
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x}). Convert it.") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); it is damaged or truncated. Fetch it again.") from error


def _encodable(text: str, where: str) -> str:
    """Refuse a text that is no Unicode: half a surrogate pair, as a JSON escape can write it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: holds {text[error.start]!r}, a lone surrogate. Repair the text.") from error
    return text
