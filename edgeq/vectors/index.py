"""Open an index, check what it is of, and search it in two stages: the codes first, then finer codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from edgeq.bundle import fingerprint
from edgeq.bundle.embedder import Embedder
from edgeq.bundle.load import load
from edgeq.codecs.codec import Codec, read_codec
from edgeq.data.sessions import unit
from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.evaluation.vector_measures import shared_neighbours
from edgeq.records import Record
from edgeq.system.untrusted import oversize, unsafe_name
from edgeq.vectors import approximate, code_file
from edgeq.vectors.records import (
    CODEC,
    CODES,
    FINE_CODEC,
    FINE_CODES,
    IDS,
    PROBE_VECTORS,
    PROBES,
    RECORD,
    IndexRecord,
)
from edgeq.vectors.scan import Rows, Searcher, exact, rescored

RESCORING_CODEC = "int8-centred"  # of the finer codes
RESCORING_DEPTH = 30  # candidates for each result (docs/decisions/vectors.md)
_MOST_BYTES = 1 << 20
_CROSS_NEIGHBOURS = 10

Vectors = NDArray[np.float32]


class FormLoss(Record):
    """Say how queries of another form of the same model do in an index: on the texts that it keeps for this."""

    texts: int
    cosine_mean: float  # of their vectors with those that the index was built with
    cosine_min: float
    neighbours_shared: float  # ratio of the first ten results that both find


@dataclass(frozen=True)
class Hit:
    """Hold one result.

    Attributes:
        row: number of the text in the file that was indexed, from 0.
        identifier: its `_id` in a BEIR corpus, else its number.
        score: estimated dot product with the query; up to a constant of the query where codes are centred.
    """

    row: int
    identifier: str
    score: float


class Index:
    """Search an index with the queries of its bundle; `edgeq.open_index` makes one."""

    def __init__(self, folder: Path, record: IndexRecord) -> None:
        """Map the codes of a folder that `build` wrote.

        Raises:
            BundleCorrupt: a file is missing, truncated, or of another version.
        """
        self.folder, self.record = folder, record
        self.codec = _codec(folder / CODEC, record.codec_sha256)
        count = record.texts.count
        self._codes = code_file.mapped(folder / CODES, self.codec.size_bytes, count)
        self._finer: Codec | None = None
        if record.rescoring_sha256 is not None:
            self._finer = _codec(folder / FINE_CODEC, record.rescoring_sha256)
            self._fine_codes = code_file.mapped(folder / FINE_CODES, self._finer.size_bytes, count)
        self._searcher: Searcher | None = None
        self._identifiers: list[str] | None = None

    def search_vectors(self, vectors: Vectors, count: int = 10, depth: int = RESCORING_DEPTH) -> Rows:
        """Find the nearest texts of float32[queries, dim].

        Args:
            vectors: of queries, in full precision.
            count: how many results.
            depth: candidates from the codes for each result, where finer codes order them.

        Returns:
            int64[queries, count], row numbers, nearest first; -1 where an approximate index found fewer.

        Raises:
            ConfigError: the dimension is another, a number is not finite, or the index has fewer texts than results.
        """
        if not 1 <= count <= self.record.texts.count:
            raise ConfigError(
                f"{self.folder}: {count} results are asked for, and the index has {self.record.texts.count} texts. "
                "Ask for at most as many, and at least one."
            )
        if self._finer is None:
            return self._opened().nearest(vectors, count)
        candidates = self._opened().nearest(vectors, min(count * depth, self.record.texts.count))
        return rescored(self._finer, self._fine_codes, vectors, candidates, count)

    def hits(self, vectors: Vectors, count: int = 10, depth: int = RESCORING_DEPTH) -> list[list[Hit]]:
        """Find the nearest texts of float32[queries, dim], with ids and scores; see `search_vectors`."""
        rows = self.search_vectors(vectors, count, depth)
        codec, codes = (self.codec, self._codes) if self._finer is None else (self._finer, self._fine_codes)
        found = []
        for query, places in zip(codec.queries(vectors), rows, strict=True):
            chosen = places[places >= 0]
            scores = codec.decode(np.asarray(codes[chosen])) @ query
            named = zip(chosen.tolist(), scores.tolist(), strict=True)
            found.append([Hit(row, self._identifier(row), score) for row, score in named])
        return found

    def _opened(self) -> Searcher:
        """Open what searches the codes, once."""
        if self._searcher is None:
            path, kind = self.folder / approximate.FILES.get(self.record.kind, ""), self.record.kind
            if kind == "hnsw":
                self._searcher = approximate.open_hnsw(self.codec, path, self.record.texts.count)
            elif kind == "ivf":
                self._searcher = approximate.open_ivf(self.codec, self._codes, path)
            else:
                self._searcher = exact(self.codec, self._codes)
        return self._searcher

    def _identifier(self, row: int) -> str:
        if self._identifiers is None:
            path = self.folder / IDS
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            self._identifiers = [str(json.loads(line)) for line in lines]
        return self._identifiers[row] if self._identifiers else str(row)

    def require_space(self, embedder: Embedder, where: str, is_exact: bool = False) -> FormLoss | None:
        """Refuse a model of another vector space; measure another form of the same one.

        Args:
            embedder: whose queries are to be searched.
            where: names it in messages.
            is_exact: refuse another form, too.

        Returns:
            What the other form loses; None for the form that the index was built with.

        Raises:
            ConfigError: the space is another, or the form is and `is_exact` is set.
        """
        found = fingerprint.space(embedder.manifest)
        if found != self.record.space:
            raise ConfigError(
                f"{where}: its vectors are of another space (fingerprint {found[:12]}) than the index {self.folder} "
                f"({self.record.space[:12]}): other weights, prompts, pooling, tokenizer or cut. Search with a bundle "
                "of the same model, or build an index with this one."
            )
        if fingerprint.form(embedder.manifest) == self.record.form:
            return None
        loss = self.form_loss(embedder.encode_document)
        if is_exact:
            raise ConfigError(
                f"{where}: is another form of the model that built {self.folder} (cosine {loss.cosine_mean:.5f} mean, "
                f"{loss.cosine_min:.4f} min), and --exact takes that form alone. Drop --exact, or "
                "give the other bundle."
            )
        return loss

    def form_loss(self, embed: Callable[[Sequence[str]], Vectors]) -> FormLoss:
        """Measure another form on the texts that the index keeps: cosine, and how many of ten results stay."""
        texts = [json.loads(line) for line in (self.folder / PROBES).read_text(encoding="utf-8").splitlines()]
        before: Vectors = np.load(self.folder / PROBE_VECTORS, allow_pickle=False)
        after = embed(texts)
        cosines = np.sum(unit(before) * unit(after), axis=1)
        count = min(_CROSS_NEIGHBOURS, self.record.texts.count)
        shared = shared_neighbours(self.search_vectors(before, count), self.search_vectors(after, count))
        return FormLoss(
            texts=len(texts), cosine_mean=float(cosines.mean()), cosine_min=float(cosines.min()),
            neighbours_shared=float(shared.mean()),
        )  # fmt: skip


def read_index(folder: Path) -> IndexRecord:
    """Read the record of an index, and check that its files have their sizes.

    Raises:
        ConfigError: there is no index.
        BundleCorrupt: the record or a file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        is_stopped = (folder / "building.json").is_file()
        hint = "Its build was stopped: give the same `edgeq index` again" if is_stopped else "Give the --to of one"
        raise ConfigError(f"{folder}: is no index: {RECORD} is not there. {hint}.")
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise BundleCorrupt(f"{path}: {reason}. Build the index again.")
    try:
        record = IndexRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(str(at) for at in item['loc'])}: {item['msg']}" for item in error.errors()[:3])
        raise BundleCorrupt(f"{path}: {details}. Use the edgeq that wrote it, or build the index again.") from error
    for ref in record.files:
        if unsafe_name(ref.path) is not None or not (folder / ref.path).is_file():
            raise BundleCorrupt(f"{folder}: {ref.path[:100]} is not there. Build the index again.")
        size = (folder / ref.path).stat().st_size
        if size != ref.size_bytes:
            raise BundleCorrupt(
                f"{folder / ref.path}: has {size} bytes; the record says {ref.size_bytes}. It is truncated or damaged: "
                "build the index again."
            )
    return record


def open_index(folder: str | Path) -> Index:
    """Open an index for searching.

    Raises:
        ConfigError: there is no index.
        BundleCorrupt: a file is missing, truncated, or of another version.
    """
    return Index(Path(folder), read_index(Path(folder)))


def searching_embedder(index: Index, bundle: Path | None, threads: int = 0) -> Embedder:
    """Load the bundle that an index was built with, or another one.

    Raises:
        ConfigError: the bundle is not where it was.
    """
    path = bundle or Path(index.record.bundle)
    if bundle is None and not path.is_dir():
        raise ConfigError(f"{path}: the bundle that built {index.folder} is not there any more. Give it with --bundle.")
    return load(path, threads)


def _codec(path: Path, wanted: str) -> Codec:
    """Read a codec, and compare it with the record's.

    Raises:
        BundleCorrupt: it is another one.
    """
    found = read_codec(path)
    if found.sha256 != wanted:
        raise BundleCorrupt(f"{path}: is another codec than the one that made the codes. Build the index again.")
    return found
