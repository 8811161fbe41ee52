"""Read STS sentence pairs (.jsonl, .tsv, .csv) and retrieval sets in BEIR layout."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConfigError


@dataclass(frozen=True)
class StsPairs:
    """Hold sentence pairs with people's similarity scores, float64[pairs]."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class RetrievalSet:
    """Hold documents, queries, and the relevance judgements of each query: position in `documents` -> relevance."""

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    qrels: tuple[Mapping[int, int], ...]


def load_sts(path: Path) -> StsPairs:
    """Read `sentence1`, `sentence2`, `score` from a .jsonl, .tsv or .csv file (also .gz); other columns are ignored.

    Raises:
        ConfigError: the file is not there, not in this form, or has fewer than three pairs.
    """
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    for where, row in _rows(path):
        first.append(_text(row, "sentence1", where))
        second.append(_text(row, "sentence2", where))
        scores.append(_number(row, "score", where))
    if len(scores) < 3 or len(set(scores)) < 2:
        raise ConfigError(
            f"{path}: {len(scores)} pairs with {len(set(scores))} different scores; at least 3 pairs that differ in "
            "score are needed to rank them. Give a larger file."
        )
    return StsPairs(tuple(first), tuple(second), np.array(scores, np.float64))


def load_beir(directory: Path) -> RetrievalSet:
    """Read a folder in BEIR layout: `corpus.jsonl`, `queries.jsonl` (either may be .gz) and `qrels.tsv`.

    `qrels/test.tsv` is read where `qrels.tsv` is missing. A document is its title and text; queries without a relevant
    document are left out.

    Raises:
        ConfigError: a file is missing or malformed, an id occurs twice, or the qrels name an id that does not exist.
    """
    documents = _by_id(_one_of(directory, "corpus.jsonl", "corpus.jsonl.gz"))
    queries = _by_id(_one_of(directory, "queries.jsonl", "queries.jsonl.gz"))
    positions = {identifier: position for position, identifier in enumerate(documents)}
    judged: dict[str, dict[int, int]] = {}
    for where, row in _rows(_one_of(directory, "qrels.tsv", "qrels/test.tsv")):
        query, document = _text(row, "query-id", where), _text(row, "corpus-id", where)
        for identifier, known, file in ((query, queries, "queries"), (document, documents, "corpus")):
            if identifier not in known:
                raise ConfigError(f"{where}: id {identifier!r} is not in {file}.jsonl. Use files that belong together.")
        judged.setdefault(query, {})[positions[document]] = int(_number(row, "score", where))
    asked = [query for query, relevance in judged.items() if max(relevance.values()) > 0]
    if not asked:
        raise ConfigError(f"{directory}: no query has a document with a score above 0. Check the qrels.")
    return RetrievalSet(
        tuple(documents.values()), tuple(queries[query] for query in asked), tuple(judged[query] for query in asked)
    )


def _one_of(directory: Path, *names: str) -> Path:
    """Give the first of these files that exists."""
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise ConfigError(f"{directory}: {' or '.join(names)} is not there. Give a folder in BEIR layout.")


def _by_id(path: Path) -> dict[str, str]:
    """Read a BEIR file as `_id` -> title and text, in the order of the file."""
    texts: dict[str, str] = {}
    for where, row in _rows(path):
        identifier = _text(row, "_id", where)
        if identifier in texts:
            raise ConfigError(f"{where}: _id {identifier!r} stands there twice; each needs its own. Remove one.")
        title = _text(row, "title", where) if row.get("title") else ""
        texts[identifier] = f"{title} {_text(row, 'text', where)}".strip()
    if not texts:
        raise ConfigError(f"{path}: holds no text; at least one line is needed.")
    return texts


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a .jsonl, .tsv or .csv file, gzipped or not: for each row `file:line`, and its values by column."""
    content = _content(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".jsonl":
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _object(line, f"{path}:{number}")
    elif suffix in (".tsv", ".csv"):
        # A tab-separated file quotes nothing: a lone quotation mark is a character of the text.
        is_tsv = suffix == ".tsv"
        reader = csv.DictReader(
            io.StringIO(content, newline=""),
            delimiter="\t" if is_tsv else ",",
            quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
        )
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: not a table ({error}). Repair the line.") from error
    else:
        raise ConfigError(f"{path}: ends in {suffix!r}; .jsonl, .tsv or .csv is needed. Rename or convert it.")


def _content(path: Path) -> str:
    """Read a UTF-8 text file, gzipped or not."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Check the path.")
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x}). Convert it.") from error
    except (gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Fetch it again.") from error


def _object(line: str, where: str) -> dict[str, Any]:
    """Parse one line as a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}). Repair the line.") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON {type(row).__name__}; an object is needed. Repair the line.")
    return row


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    """Give a column's value as text; an id may be a whole number."""
    value = row.get(key)
    if not isinstance(value, str | int) or isinstance(value, bool):
        found = ", ".join(str(name) for name in row)
        raise ConfigError(f"{where}: {key!r} holds no text; found columns {found}. Add or repair it.")
    return str(value)


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    """Give a column's value as a finite number."""
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {key!r} holds no number, found {row.get(key)!r}. Add or repair it.") from error
    if not np.isfinite(value):
        raise ConfigError(f"{where}: {key!r} is {value}; a finite number is needed. Repair it.")
    return value
