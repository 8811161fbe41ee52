"""Read texts from .txt, .jsonl and .csv files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from edgeq.errors import ConfigError
from edgeq.targets import data_dir


def default_texts() -> tuple[Path, Path]:
    """Give the paths of the default calibration and validation texts."""
    folder = data_dir("calibration_data")
    return folder / "calibration.jsonl", folder / "validation.jsonl"


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """Read the texts of a .txt (one per line), .jsonl or .csv file, stripped and without blank ones.

    For sets, where a text's place means nothing; `read_records` keeps one text for each record.

    Args:
        path: the file, UTF-8.
        column: the key or column that holds the text; None means "text".

    Raises:
        ConfigError: the file is missing, empty, of another kind, not UTF-8, broken, or has no such column.
    """
    kept = [text.strip() for text in read_records(path, column) if text.strip()]
    if not kept:
        raise ConfigError(f"{path}: every line is blank; at least one text is needed")
    return kept


def read_records(path: Path, column: str | None = None) -> list[str]:
    """Read the text of each record of a .txt (one per line), .jsonl or .csv file, as it stands there, blank or not.

    Args:
        path: the file, UTF-8.
        column: the key or column that holds the text; None means "text".

    Returns:
        As many texts as the file has records. An empty line is a record of a .txt file, but none of a .jsonl or .csv
        file, as for other readers of these formats.

    Raises:
        ConfigError: the file is missing, empty, of another kind, not UTF-8, broken, or has no such column.
    """
    if path.is_dir():
        raise ConfigError(
            f"{path}: is a folder; texts come as a file, .txt, .jsonl or .csv. Name one, or give images with --images."
        )
    content = _read(path)
    readers = {".txt": _lines, ".jsonl": _json_lines, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: texts come as {', '.join(readers)}; rename or convert the file")
    return [_encodable(text, f"{path}: record {row}") for row, text in enumerate(reader(path, content, column))]


def lines_of(content: str) -> list[str]:
    r"""Split a text into lines at \n, \r\n and \r alone: U+2028 and its like may stand within a record."""
    return [line.removesuffix("\n") for line in io.StringIO(content, newline=None)]


def _encodable(text: str, where: str) -> str:
    """Refuse a text that is no Unicode: half a surrogate pair, as a JSON escape can write it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} (from 0): holds {text[error.start]!r}, half a character (a lone surrogate). Repair the text."
        ) from error
    return text


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if not content:
        raise ConfigError(f"{path}: the file is empty; at least one text is needed")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte {content[error.start]:#04x}"
        raise ConfigError(f"{path}:{line}: {found} is not UTF-8; convert the file to UTF-8") from error


def _lines(path: Path, content: str, column: str | None) -> Iterator[str]:
    if column is not None:
        raise ConfigError(f"{path}: a .txt file has no columns; drop --column {column}")
    yield from lines_of(content)


def _json_lines(path: Path, content: str, column: str | None) -> Iterator[str]:
    name = column or "text"
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error}") from error
        yield _json_text(row, name, f"{path}:{number}")


def _json_text(row: object, name: str, where: str) -> str:
    """Give the text of a JSONL record, or say what stands in its place."""
    if not isinstance(row, dict):
        raise ConfigError(
            f'{where}: the line is {_json_kind(row)}; an object is needed, such as {{"{name}": "a text"}}. Rewrite the '
            "file, or give lines without quotes as .txt."
        )
    if name not in row:
        keys = ", ".join(row) or "no key"
        raise ConfigError(f'{where}: no text under "{name}"; found {keys}. Give --column with its key.')
    value = row[name]
    if not isinstance(value, str):
        hint = ' Write "" for a record without text.' if value is None else ""
        raise ConfigError(f'{where}: "{name}" is {_json_kind(value)}; a string is needed.{hint}')
    return value


def _json_kind(value: object) -> str:
    """Name the kind of a JSON value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return kinds[type(value)]


def _csv_rows(path: Path, content: str, column: str | None) -> Iterator[str]:
    name = column or "text"
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        if name not in (rows.fieldnames or ()):
            found = ", ".join(rows.fieldnames or ())
            raise ConfigError(f'{path}: no column "{name}"; found {found}. Give --column with one of them.')
        columns = len(rows.fieldnames or ())
        for row in rows:
            if None in row:
                raise ConfigError(
                    f"{path}:{rows.line_num}: more values than the {columns} columns of the header, so that a text may "
                    "be cut at a comma. Put texts that hold one in quotes."
                )
            yield row[name] or ""  # a row may end before the column: a record without text
    except csv.Error as error:
        raise ConfigError(f"{path}:{rows.line_num}: not CSV: {error}") from error
