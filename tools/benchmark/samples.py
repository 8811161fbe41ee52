"""Read the evaluation texts, and thin them out for runtimes that are too slow for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeq.data.splits import deduplicate
from edgeq.evaluation.datasets import RetrievalSet, StsPairs, load_beir, load_sts

FILES = ("sts_dev.jsonl", "squad11dev", "calib_20k.jsonl.gz")  # below --data


@dataclass(frozen=True)
class Sample:
    """Hold what quality is compared on. Texts: of documents, queries and pairs, each once."""

    pairs: StsPairs
    retrieval: RetrievalSet

    @property
    def texts(self) -> list[str]:
        """Give every text once."""
        return deduplicate(
            [*self.retrieval.documents, *self.retrieval.queries, *self.pairs.first, *self.pairs.second]
        )  # fmt: skip


def load(data: Path) -> Sample:
    """Read the whole set."""
    return Sample(load_sts(data / FILES[0]), load_beir(data / FILES[1]))


def thinned(whole: Sample, every: int) -> Sample:
    """Keep every so-many-th pair, question and document, and each document that a kept question is judged on.

    A smaller corpus makes finding easier, for FP32 too: figures are percentages of FP32's on the same sample.
    """
    pairs, data = whole.pairs, whole.retrieval
    qrels = data.qrels[::every]
    kept = sorted({*range(0, len(data.documents), every), *(document for judged in qrels for document in judged)})
    place = {document: position for position, document in enumerate(kept)}
    return Sample(
        StsPairs(pairs.first[::every], pairs.second[::every], pairs.scores[::every]),
        RetrievalSet(
            tuple(data.documents[document] for document in kept),
            data.queries[::every],
            tuple({place[document]: score for document, score in judged.items()} for judged in qrels),
        ),
    )
