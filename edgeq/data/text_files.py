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
    """Read the texts of a .txt (one per line), .jsonl or .csv file, without blank ones.

    Args:
        path: the file, UTF-8.
        column: the key or column that holds the text; None means "text".

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
    texts = [text.strip() for text in reader(path, content, column)]
    kept = [text for text in texts if text]
    if not kept:
        raise ConfigError(f"{path}: every line is blank; at least one text is needed")
    return kept


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
    yield from content.splitlines()


def _json_lines(path: Path, content: str, column: str | None) -> Iterator[str]:
    name = column or "text"
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(f'{path}:{number}: no text under "{name}"; found {found}. Give --column with its key.')
        yield row[name]


def _csv_rows(path: Path, content: str, column: str | None) -> Iterator[str]:
    name = column or "text"
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        if name not in (rows.fieldnames or ()):
            found = ", ".join(rows.fieldnames or ())
            raise ConfigError(f'{path}: no column "{name}"; found {found}. Give --column with one of them.')
        for row in rows:
            yield row[name] or ""
    except csv.Error as error:
        raise ConfigError(f"{path}:{rows.line_num}: not CSV: {error}") from error
