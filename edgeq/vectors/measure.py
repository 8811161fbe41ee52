"""Measure what codes and indexes lose: recall, nDCG, regret, bytes and queries a second beside FP32's exact search."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.codec import Codec
from edgeq.codecs.fit import fit_codec
from edgeq.codecs.names import parse
from edgeq.codecs.packing import Codes
from edgeq.codecs.statistics import VectorStatistics
from edgeq.errors import ConfigError
from edgeq.records import Record
from edgeq.system.files import work_dir
from edgeq.system.progress import Progress, silent
from edgeq.vectors import approximate
from edgeq.vectors.index import RESCORING_CODEC, RESCORING_DEPTH
from edgeq.vectors.scan import FloatArray, Rows, Searcher, best, exact, rescored

DEPTHS = (1, 10, 100)
_FINE_KINDS = ("float32", "float16", "int8", "int8-vector")
_BLOCK_QUERIES = 256
_TIMED_QUERIES, _TIMED_S = 100, 1.0


@dataclass(frozen=True)
class Side:
    """Hold one model's vectors of the same texts.

    Attributes:
        name: of the model.
        documents: float32[documents, dim], of unit length for cosine.
        queries: float32[queries, dim].
    """

    name: str
    documents: FloatArray
    queries: FloatArray


@dataclass(frozen=True)
class Truth:
    """Hold FP32's exact search: its vectors, and the rows of the nearest hundred.

    Attributes:
        side: FP32's vectors.
        nearest: int64[queries, up to 100].
        qrels: for each query, document -> relevance; empty where nothing is judged.
    """

    side: Side
    nearest: Rows
    qrels: Sequence[Mapping[int, int]]


class CodeFigures(Record):
    """Hold the figures of one model, codec and index; recall is against FP32's exact search on as many documents."""

    documents: int
    queries: int
    model: str
    codec: str
    index: str
    code_bytes: int  # that a search reads of each document; of an HNSW or IVF index, of those it visits
    rescoring: str | None  # codec of the finer codes that order the candidates
    rescoring_bytes: int
    depth: int  # candidates for each of ten results
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float | None  # None with fewer than 100 documents
    ndcg_at_10: float | None  # in ratio to FP32's; None where nothing is judged
    regret_at_10: float
    queries_per_second: float  # one query at a time
    lost_by_model: float  # recall@10 that the model's floats lack
    lost_by_code: float  # that its codes lack of these, searched exactly
    lost_by_index: float  # that the index lacks of these


def truth(side: Side, qrels: Sequence[Mapping[int, int]] = ()) -> Truth:
    """Search FP32's vectors exactly.

    Raises:
        ConfigError: there are fewer than ten documents.
    """
    if len(side.documents) < DEPTHS[1]:
        raise ConfigError(
            f"evaluate: {len(side.documents)} documents; at least {DEPTHS[1]} are needed for recall@10. Give more."
        )
    return Truth(side, _float_nearest(side, min(DEPTHS[-1], len(side.documents))), qrels)


def measure(
    ideal: Truth,
    sides: Sequence[Side],
    codecs: Sequence[str],
    kinds: Sequence[approximate.Kind],
    known: VectorStatistics | None,
    rescoring: str | None = RESCORING_CODEC,
    depths: Sequence[int] = (RESCORING_DEPTH,),
    progress: Progress = silent,
) -> tuple[CodeFigures, ...]:
    """Measure every model, codec and index.

    Args:
        ideal: FP32's exact search.
        sides: the models' vectors of the same texts.
        codecs: names.
        kinds: of indexes; a codec that HNSW does not hold is left out of it.
        known: statistics of a bundle; without them, and for trained codecs, the documents are the sample.
        rescoring: codec of the finer codes, for codes coarser than 8 bits; None leaves them out.
        depths: candidates for each of ten results, each a row; 1 leaves the finer codes out.
        progress: called as `progress(stage, done, total)`.

    Raises:
        ConfigError: there is no such codec, or too few documents to train it.
        ToolMissing: FAISS is needed and not installed.
    """
    names = [parse(codec) for codec in codecs]
    for kind in kinds:
        for name in names:
            if kind != "hnsw" or name.kind in approximate.HNSW_KINDS:
                approximate.require_kind(kind, name)
    found = []
    total = len(sides) * len(codecs)
    for side in sides:
        floats = _overlap(ideal, _float_nearest(side, DEPTHS[1]))
        for name in names:
            codec = fit_codec(name.text, side.documents, "the documents", known)
            codes = codec.encode_bytes(side.documents)
            finer = None
            if rescoring is not None and name.kind not in _FINE_KINDS and max(depths) > 1:
                finer = fit_codec(rescoring, side.documents, "the documents", known)
            fine_codes = None if finer is None else finer.encode_bytes(side.documents)
            searchers = {
                kind: _searcher(kind, codec, codes) for kind in kinds
                if kind != "hnsw" or name.kind in approximate.HNSW_KINDS
            }  # fmt: skip
            plain = searchers.get("exact") or exact(codec, codes)
            for depth in depths if finer is not None else (1,):
                two = _Stages(codec, codes, *((finer, fine_codes) if depth > 1 else (None, None)), depth)
                scanned = two.results(plain, side.queries, ideal.nearest.shape[1])
                for kind, searcher in searchers.items():
                    results = scanned
                    if kind != "exact":
                        results = two.results(searcher, side.queries, ideal.nearest.shape[1])
                    found.append(
                        _figures(ideal, side, two, searcher, results, kind, floats, _overlap(ideal, scanned[0]))
                    )
            progress("codes", len(found), total * len(kinds))
    return tuple(found)


@dataclass(frozen=True)
class _Stages:
    """Hold the codes of one codec, and finer ones that order the candidates."""

    codec: Codec
    codes: Codes
    finer: Codec | None
    fine_codes: Codes | None
    depth: int

    def results(self, searcher: Searcher, queries: FloatArray, most: int) -> tuple[Rows, Rows]:
        """Search the codes once, and order candidates by the finer ones: ten results, and the first `most`."""
        if self.finer is None or self.fine_codes is None:
            found = searcher.nearest(queries, most)
            return found[:, : DEPTHS[1]], found
        few = min(DEPTHS[1] * self.depth, len(self.codes))
        candidates = searcher.nearest(queries, max(few, most))
        first = rescored(self.finer, self.fine_codes, queries, candidates[:, :few], DEPTHS[1])
        return first, rescored(self.finer, self.fine_codes, queries, candidates, most)

    def ten(self, searcher: Searcher, queries: FloatArray) -> Rows:
        """Search as an index does: ten results."""
        if self.finer is None or self.fine_codes is None:
            return searcher.nearest(queries, DEPTHS[1])
        candidates = searcher.nearest(queries, min(DEPTHS[1] * self.depth, len(self.codes)))
        return rescored(self.finer, self.fine_codes, queries, candidates, DEPTHS[1])


def _figures(
    ideal: Truth, side: Side, two: _Stages, searcher: Searcher, results: tuple[Rows, Rows], kind: str, floats: float,
    scanned: float,
) -> CodeFigures:  # fmt: skip
    """Measure the results of one searcher, and its speed."""
    found, wide = results
    shared = _overlap(ideal, found)
    return CodeFigures(
        documents=len(side.documents),
        queries=len(side.queries),
        model=side.name,
        codec=two.codec.name.text,
        index=kind,
        code_bytes=two.codec.size_bytes,
        rescoring=None if two.finer is None else two.finer.name.text,
        rescoring_bytes=0 if two.finer is None else two.finer.size_bytes,
        depth=1 if two.finer is None else two.depth,
        recall_at_1=_overlap(ideal, found, 1),
        recall_at_10=shared,
        recall_at_100=_overlap(ideal, wide, DEPTHS[2]) if wide.shape[1] >= DEPTHS[2] else None,
        ndcg_at_10=_ndcg(found, ideal.qrels) / _ndcg(ideal.nearest, ideal.qrels) if ideal.qrels else None,
        regret_at_10=_regret(ideal, found),
        queries_per_second=_speed(lambda query: two.ten(searcher, query), side.queries),
        lost_by_model=1.0 - floats,
        lost_by_code=floats - scanned,
        lost_by_index=scanned - shared,
    )


def _searcher(kind: approximate.Kind, codec: Codec, codes: Codes) -> Searcher:
    """Build an index in memory."""
    if kind == "exact":
        return exact(codec, codes)
    if kind == "ivf":
        return approximate.build_ivf(codec, codes, silent)
    with work_dir() as work:
        path = Path(work) / approximate.FILES["hnsw"]
        approximate.build_hnsw(codec, codes, path, silent)
        return approximate.open_hnsw(codec, path, len(codes))


def _float_nearest(side: Side, count: int) -> Rows:
    """Search floats exactly, a few queries at a time."""
    count = min(count, len(side.documents))
    found = np.empty((len(side.queries), count), np.int64)
    for start in range(0, len(side.queries), _BLOCK_QUERIES):
        some = side.queries[start : start + _BLOCK_QUERIES]
        found[start : start + len(some)] = best(some @ side.documents.T, count)
    return found


def _overlap(ideal: Truth, found: Rows, count: int = DEPTHS[1]) -> float:
    """Give the ratio of FP32's first `count` that are among the first `count` found."""
    wanted, given = ideal.nearest[:, :count], found[:, :count]
    same = [len(set(one) & set(other)) for one, other in zip(wanted.tolist(), given.tolist(), strict=True)]
    return float(np.mean(same) / wanted.shape[1])


def _ndcg(found: Rows, qrels: Sequence[Mapping[int, int]]) -> float:
    """Give nDCG@10 with linear gain, as `edgeq.evaluation.tasks` does."""
    discounts = 1.0 / np.log2(np.arange(2, DEPTHS[1] + 2))
    gains = []
    for ranked, judged in zip(found[:, : DEPTHS[1]], qrels, strict=True):
        relevance = np.array([max(judged.get(int(row), 0), 0) for row in ranked], np.float64)
        ideal = np.sort(np.array([score for score in judged.values() if score > 0], np.float64))[::-1][: DEPTHS[1]]
        gains.append(float(relevance @ discounts[: len(relevance)]) / float(ideal @ discounts[: len(ideal)]))
    return float(np.mean(gains))


def _regret(ideal: Truth, found: Rows) -> float:
    """Give the FP32 similarity that is lost by the ten that were found, as regret@10 of parity does."""
    documents, lost = ideal.side.documents, []
    mean = documents.mean(axis=0)
    for query, wanted, given in zip(ideal.side.queries, ideal.nearest, found, strict=True):
        count = min(DEPTHS[1], len(wanted))
        chosen = given[:count][given[:count] >= 0]
        most, taken = float(np.sum(documents[wanted[:count]] @ query)), float(np.sum(documents[chosen] @ query))
        taken += (count - len(chosen)) * float(mean @ query)
        possible = most - count * float(mean @ query)
        lost.append(max(most - taken, 0.0) / possible if possible > 0 else 0.0)
    return float(np.mean(lost))


def _speed(search: Callable[[FloatArray], Rows], queries: FloatArray) -> float:
    """Time single queries, and give how many fit in a second."""
    some = queries[:_TIMED_QUERIES]
    search(some[:1])
    begun, done = time.perf_counter(), 0
    while done < len(some) and time.perf_counter() - begun < _TIMED_S:
        search(some[done : done + 1])
        done += 1
    return done / (time.perf_counter() - begun)


def cross(queries: Side, documents: Side) -> Side:
    """Pair one model's queries with another's documents, as a phone asks a server's index."""
    return Side(f"queries {queries.name}, documents {documents.name}", documents.documents, queries.queries)


def normalised(rows: NDArray[np.float32]) -> FloatArray:
    """Bring float32[n, dim] to unit length, so that dot products are cosines."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), np.float32)
