"""Choose codec, rescoring depth and index by a budget of bytes and a recall, measured on the user's own texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.fit import FEWEST_SAMPLES, fit_codec
from edgeq.errors import ConfigError
from edgeq.records import Record
from edgeq.vectors import approximate
from edgeq.vectors.measure import CodeFigures, Side, Truth, measure, truth

if TYPE_CHECKING:
    from edgeq.codecs.statistics import VectorStatistics
    from edgeq.system.progress import Progress

DEPTHS = (1, 4, 10, 30)  # candidates for each result; 1: no rescoring
FEWEST_TEXTS = 200
_MOST_QUERIES = 500
_LINKS_BYTES = 2 * approximate.NEIGHBOURS * 4 + 16  # of HNSW's lowest level, with its share of the others and the heads
_LIST_BYTES = 8  # of a row number in IVF's lists
_UNTRAINED = (
    "float32", "float16", "int8", "int8-centred", "rabitq4", "int4", "rabitq3", "rabitq2", "ternary", "rabitq",
    "binary", "binary-centred",
)  # fmt: skip


class Choice(Record):
    """Hold one combination, with its figures on the user's texts."""

    figures: CodeFigures
    memory_bytes_per_document: float  # that a search keeps in memory; finer codes stay on disk, in a mapped file
    disk_bytes_per_document: float
    holds: bool  # both the bytes and the recall


class Advice(Record):
    """Hold what was measured, the best combination first, and what the recall is of."""

    documents: int
    queries: int
    bytes_most: float
    recall_least: float
    choices: tuple[Choice, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> Choice | None:
        """Give the combination that holds both, the best of them by recall; None without any."""
        return next((each for each in self.choices if each.holds), None)


def budget(bytes_each: float | None, memory_bytes: float | None, documents: int | None) -> float:
    """Give the bytes for each document from one of two statements.

    Raises:
        ConfigError: neither or both are stated, or one is not positive.
    """
    if (bytes_each is None) == (memory_bytes is None):
        raise ConfigError("recommend: state the room, either --bytes N or --memory SIZE with --documents COUNT.")
    if bytes_each is None:
        if documents is None or memory_bytes is None:
            raise ConfigError("recommend: --memory says nothing without --documents. Give how many there will be.")
        bytes_each = memory_bytes / max(documents, 1)
    if bytes_each <= 0:
        raise ConfigError(f"recommend: room of {bytes_each:g} bytes for each document; more than 0 is needed.")
    return bytes_each


def recommend(
    vectors: NDArray[np.float32],
    bytes_most: float,
    recall_least: float,
    known: VectorStatistics | None,
    kinds: Sequence[approximate.Kind],
    expected: int | None,
    progress: Progress,
) -> Advice:
    """Measure codecs on a user's vectors, a tenth of which ask for the others.

    Args:
        vectors: float32[texts, dim], of unit length, of different texts.
        bytes_most: in memory for each document.
        recall_least: recall@10 against exact search in the floats, from 0 to 1.
        known: statistics of the bundle, if it has some.
        kinds: of indexes to try.
        expected: how many documents there will be.
        progress: called as `progress(stage, done, total)`.

    Raises:
        ConfigError: there are fewer than 200 texts, or the recall is no ratio.
    """
    if not 0 < recall_least <= 1:
        raise ConfigError(f"--recall {recall_least:g}: a ratio above 0 and up to 1 is needed, such as 0.95.")
    if len(vectors) < FEWEST_TEXTS:
        raise ConfigError(
            f"recommend: {len(vectors)} different texts; at least {FEWEST_TEXTS} are needed to measure. Give more."
        )
    asking = np.zeros(len(vectors), bool)
    asking[np.linspace(0, len(vectors) - 1, min(_MOST_QUERIES, len(vectors) // 10)).round().astype(int)] = True
    side = Side("floats", vectors[~asking], vectors[asking])
    ideal = truth(side)
    names = _candidates(vectors.shape[1], len(side.documents), bytes_most, known, side)
    found: list[Choice] = []
    for step, name in enumerate(names):
        progress("recommend", step, len(names))
        found += _measured(ideal, name, kinds, bytes_most, recall_least, known)
    progress("recommend", len(names), len(names))
    found.sort(key=lambda each: _order(each, bytes_most, recall_least))
    notes = [
        f"recall@10 is measured on {len(side.documents):,} documents"
        + (f"; among {expected:,} it will be lower: take it as an upper bound." if expected else ".")
    ]
    if len(side.documents) < FEWEST_SAMPLES:
        notes.append(f"PCA, PQ and OPQ are left out: they are trained on at least {FEWEST_SAMPLES:,} texts.")
    return Advice(
        documents=len(side.documents), queries=len(side.queries), bytes_most=bytes_most, recall_least=recall_least,
        choices=tuple(found), notes=tuple(notes),
    )  # fmt: skip


def _candidates(dim: int, count: int, bytes_most: float, known: VectorStatistics | None, side: Side) -> tuple[str, ...]:
    """Choose codecs near the room: those that fit, and the smallest that do not."""
    names = list(_UNTRAINED)
    if count >= FEWEST_SAMPLES:
        for width in (dim // 4, dim // 2, 3 * dim // 4):
            names += [f"pca{width}+{kind}" for kind in ("int8", "int4", "rabitq2")]
        names += [f"opq{parts}" for parts in {8 * max(1, int(bytes_most) // 8)} if 8 <= parts <= dim // 2]
    sizes = {name: fit_codec(name, side.documents[:64], "", known).size_bytes for name in _UNTRAINED}
    fitting = [name for name in names if sizes.get(name, 0) <= bytes_most]
    larger = sorted((name for name in _UNTRAINED if sizes[name] > bytes_most), key=lambda name: sizes[name])
    return (*fitting, *larger[:2])


def _measured(
    ideal: Truth, name: str, kinds: Sequence[approximate.Kind], bytes_most: float, recall_least: float,
    known: VectorStatistics | None,
) -> list[Choice]:  # fmt: skip
    """Measure one codec in every kind of index and at every depth."""
    choices = []
    for figures in measure(ideal, [ideal.side], [name], kinds, known, depths=DEPTHS):
        memory = figures.code_bytes + {"hnsw": _LINKS_BYTES, "ivf": _LIST_BYTES}.get(figures.index, 0)
        choices.append(
            Choice(
                figures=figures, memory_bytes_per_document=memory,
                disk_bytes_per_document=memory + figures.rescoring_bytes,
                holds=memory <= bytes_most and figures.recall_at_10 >= recall_least,
            )
        )  # fmt: skip
    return choices


def _order(choice: Choice, bytes_most: float, recall_least: float) -> tuple[bool, float, float]:
    """Put those first that hold, the smallest first; then those nearest to holding."""
    if choice.holds:
        return False, choice.memory_bytes_per_document, float(choice.figures.depth)
    missing = max(0.0, recall_least - choice.figures.recall_at_10) / recall_least
    over = max(0.0, choice.memory_bytes_per_document / bytes_most - 1)
    return True, missing + over, choice.memory_bytes_per_document
