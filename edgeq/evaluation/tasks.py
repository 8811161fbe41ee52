"""Score STS (Spearman) and retrieval (nDCG@10, recall@10) with an artifact's vectors beside FP32's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.data.sessions import unit
from edgeq.data.text_input import Method
from edgeq.errors import ConfigError
from edgeq.evaluation.datasets import RetrievalSet, StsPairs, load_beir, load_sts
from edgeq.evaluation.vector_measures import rank_correlation, shared_neighbours
from edgeq.records import Record

__all__ = [
    "Comparison",
    "Embed",
    "RetrievalResult",
    "RetrievalSet",
    "Retrieved",
    "StsPairs",
    "StsResult",
    "evaluate_retrieval",
    "evaluate_sts",
    "load_beir",
    "load_sts",
    "retrieval",
    "sts_spearman",
]

_DEPTH = 10
_BLOCK_ROWS = 512

FloatArray = NDArray[np.float32]
# Texts, and the method that decides prompt and length -> float32[texts, dim].
Embed = Callable[[Sequence[str], Method], FloatArray]


@dataclass(frozen=True)
class Retrieved:
    """Hold the retrieval figures of one model, and its ranking: int64[queries, 10], corpus positions, nearest first."""

    ndcg_at_10: float
    recall_at_10: float
    ranking: NDArray[np.int64]


class Comparison(Record):
    """Hold one figure of FP32 and of the artifact, and how much of the first the second keeps."""

    float32: float
    artifact: float
    retention_percent: float


class StsResult(Record):
    """Hold the STS figures of FP32 and the artifact."""

    pairs: int
    spearman: Comparison


class RetrievalResult(Record):
    """Hold the retrieval figures of FP32 and the artifact."""

    documents: int
    queries: int
    ndcg_at_10: Comparison
    recall_at_10: Comparison
    top10_overlap: float  # ratio of the first ten documents that both rankings share


def sts_spearman(first: FloatArray, second: FloatArray, scores: NDArray[np.float64]) -> float:
    """Give Spearman's correlation of the pairs' cosines with people's scores; both sides are float32[pairs, dim].

    Raises:
        ConfigError: a vector holds NaN or infinity.
    """
    _require_finite(first, second)
    return rank_correlation(np.sum(unit(first) * unit(second), axis=1), scores)


def retrieval(query_vectors: FloatArray, corpus_vectors: FloatArray, qrels: Sequence[Mapping[int, int]]) -> Retrieved:
    """Rank the corpus for each query by cosine.

    nDCG@10 has linear gain and a log2 discount, as trec_eval's `ndcg_cut`; recall@10 is the ratio of a query's
    relevant documents among the first ten. Both are means over the queries.

    Args:
        query_vectors: float32[queries, dim].
        corpus_vectors: float32[documents, dim].
        qrels: for each query, position of a document -> relevance, at least one above 0.

    Raises:
        ConfigError: a vector holds NaN or infinity.
    """
    _require_finite(query_vectors, corpus_vectors)
    ranking = _ranking(unit(query_vectors), unit(corpus_vectors))
    discounts = 1.0 / np.log2(np.arange(2, _DEPTH + 2))
    gains: list[float] = []
    recalls: list[float] = []
    for ranked, judged in zip(ranking, qrels, strict=True):
        relevance = np.array([max(judged.get(int(document), 0), 0) for document in ranked], np.float64)
        ideal = np.sort(np.array([score for score in judged.values() if score > 0], np.float64))[::-1]
        best = float(np.sum(ideal[:_DEPTH] * discounts[: len(ideal)]))
        gains.append(float(np.sum(relevance * discounts[: len(relevance)])) / best)
        recalls.append(np.count_nonzero(relevance) / len(ideal))
    return Retrieved(float(np.mean(gains)), float(np.mean(recalls)), ranking)


def evaluate_sts(pairs: StsPairs, reference: Embed, artifact: Embed) -> StsResult:
    """Score FP32 and the artifact on sentence pairs.

    Raises:
        ConfigError: FP32 does not correlate with the scores, or a vector is not finite.
    """
    figures = [
        sts_spearman(embed(pairs.first, "encode"), embed(pairs.second, "encode"), pairs.scores)
        for embed in (reference, artifact)
    ]
    return StsResult(pairs=len(pairs.scores), spearman=_compare("Spearman", *figures))


def evaluate_retrieval(data: RetrievalSet, reference: Embed, artifact: Embed) -> RetrievalResult:
    """Score FP32 and the artifact on retrieval, with the model's own prompts and lengths for queries and documents.

    Raises:
        ConfigError: FP32 finds no relevant document, or a vector is not finite.
    """
    before, after = (
        retrieval(embed(data.queries, "encode_query"), embed(data.documents, "encode_document"), data.qrels)
        for embed in (reference, artifact)
    )
    return RetrievalResult(
        documents=len(data.documents),
        queries=len(data.queries),
        ndcg_at_10=_compare("nDCG@10", before.ndcg_at_10, after.ndcg_at_10),
        recall_at_10=_compare("recall@10", before.recall_at_10, after.recall_at_10),
        top10_overlap=float(shared_neighbours(before.ranking, after.ranking).mean()),
    )


def _compare(figure: str, float32: float, artifact: float) -> Comparison:
    """Give what percentage of FP32's figure the artifact keeps."""
    if not float32 > 0.0:
        raise ConfigError(
            f"evaluation: {figure} of FP32 is {float32:.4f}; a figure above 0 is needed to say what is kept of it. "
            "Check that scores and texts belong together."
        )
    return Comparison(float32=float32, artifact=artifact, retention_percent=100.0 * artifact / float32)


def _ranking(queries: NDArray[np.float64], documents: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rank each query's nearest documents by dot product, int64[queries, min(10, documents)]; ties keep file order."""
    depth = min(_DEPTH, len(documents))
    ranking = np.empty((len(queries), depth), np.int64)
    for start in range(0, len(queries), _BLOCK_ROWS):
        similarities = queries[start : start + _BLOCK_ROWS] @ documents.T
        ranking[start : start + _BLOCK_ROWS] = np.argsort(-similarities, axis=1, kind="stable")[:, :depth]
    return ranking


def _require_finite(*vectors: FloatArray) -> None:
    if not all(np.isfinite(rows).all() for rows in vectors):
        raise ConfigError(
            "evaluation: the vectors hold NaN or infinity, of which no figure can be made. "
            "Run `edgeq validate` on the bundle to see for which text."
        )
