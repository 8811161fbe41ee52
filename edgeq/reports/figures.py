"""Measure the vectors of a card's runtimes: each against FP32, and against every other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from edgeq.data.sessions import Embeddings
from edgeq.data.tokens import Tokens
from edgeq.evaluation import parity
from edgeq.evaluation.vector_measures import centred_cosines
from edgeq.records import Measures
from edgeq.reports.contents import Pair, TextError, WorstText

_WORST_TEXTS = 10
_SHOWN_CHARS = 200

DoubleArray = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Hold one runtime's vectors, float32[texts, dim], with their measures against FP32's."""

    name: str
    embeddings: Embeddings
    measures: Measures
    cosines: DoubleArray  # float64[texts], centred


def measured(
    name: str, reference: Embeddings, embeddings: Embeddings, texts: Sequence[str], invariance: float
) -> Measured:
    """Measure one runtime's vectors against FP32's.

    Raises:
        ParityFailed: they have another shape, or hold NaN or infinity.
    """
    measures = parity.measure(reference, embeddings, texts, invariance)
    return Measured(name, embeddings, measures, cosines(reference, embeddings))


def cosines(first: Embeddings, second: Embeddings) -> DoubleArray:
    """Give the cosine of each text's two vectors, both less the mean of the first, float64[texts]."""
    return centred_cosines(first, second)


def percentiles(values: DoubleArray) -> tuple[float, ...]:
    """Give percentiles 0, 1, ... 100, each the value of one text."""
    return tuple(float(value) for value in np.percentile(values, np.arange(101), method="nearest"))


def pairs(vectors: Sequence[tuple[str, Embeddings]]) -> tuple[Pair, ...]:
    """Give mean and smallest centred cosine between the vectors of every two runtimes."""
    made = []
    for (first, ours), (second, theirs) in combinations(vectors, 2):
        found = cosines(ours, theirs)
        made.append(Pair(first=first, second=second, cosine_mean=float(found.mean()), cosine_min=float(found.min())))
    return tuple(made)


def worst_texts(
    artifacts: Sequence[Measured], reference: Embeddings, texts: Sequence[str], tokens: Tokens
) -> tuple[WorstText, ...]:
    """Give the ten texts with the lowest centred cosine of any artifact with FP32, worst first, with all errors."""
    if not artifacts:
        return ()
    lowest = np.min([item.cosines for item in artifacts], axis=0)
    return tuple(
        WorstText(
            text=texts[row] if len(texts[row]) <= _SHOWN_CHARS else f"{texts[row][:_SHOWN_CHARS]}…",
            tokens=len(tokens.ids[row]),
            errors=tuple(
                TextError(
                    name=item.name,
                    cosine=float(item.cosines[row]),
                    max_abs_error=float(np.abs(item.embeddings[row].astype(np.float64) - reference[row]).max()),
                )
                for item in artifacts
            ),
        )
        for row in np.argsort(lowest, kind="stable")[:_WORST_TEXTS].tolist()
    )
