"""Measure codes and indexes for the verb `evaluate`, and print them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli import console
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    from edgeq.evaluation.datasets import RetrievalSet
    from edgeq.evaluation.tasks import Embed
    from edgeq.records import Manifest
    from edgeq.vectors.approximate import Kind
    from edgeq.vectors.measure import CodeFigures


def listed(given: Sequence[str] | None) -> tuple[str, ...]:
    """Split what an option holds at commas; it may be given several times."""
    return tuple(dict.fromkeys(part.strip() for text in given or () for part in text.split(",") if part.strip()))


def kinds_of(given: Sequence[str] | None) -> tuple[Kind, ...]:
    """Read the kinds of indexes.

    Raises:
        ConfigError: there is no such kind.
    """
    from edgeq.vectors.approximate import KINDS

    asked = listed(given) or ("exact",)
    unknown = [name for name in asked if name not in KINDS]
    if unknown:
        raise ConfigError(f"--index {unknown[0]}: is none of {', '.join(KINDS)}. Choose one of them.")
    return tuple(kind for kind in KINDS if kind in asked)


def measured(
    bundle: Path,
    manifest: Manifest,
    data: RetrievalSet,
    distractors: Sequence[str],
    sides: tuple[Embed, Embed],
    codecs: Sequence[str],
    kinds: Sequence[Kind],
) -> tuple[CodeFigures, ...]:
    """Embed with FP32 and the artifact, and measure each of them, and the artifact's queries in FP32's documents."""
    from edgeq.codecs.statistics import read_statistics
    from edgeq.vectors.measure import Side, cross, measure, normalised, truth

    documents = (*data.documents, *distractors)
    named = []
    for name, embed in zip(("FP32", manifest.target.name), sides, strict=True):
        vectors = (embed(documents, "encode_document"), embed(data.queries, "encode_query"))
        named.append(Side(name, *(normalised(each) for each in vectors)))
    known = None if manifest.codecs is None else read_statistics(bundle / manifest.codecs.path)
    pairs = (cross(named[1], named[0]), cross(named[0], named[1]))
    with console.stages() as progress:
        ideal = truth(named[0], data.qrels)
        return measure(ideal, (*named, *pairs), codecs, kinds, known, progress=progress)


def put_figures(figures: Sequence[CodeFigures]) -> None:
    """Print a line for each model, codec and index."""
    rows = [
        [
            each.model, each.codec, each.index,
            f"{each.code_bytes}" + (f" + {each.rescoring_bytes}" if each.rescoring else ""),
            f"{each.recall_at_1:.4f}", f"{each.recall_at_10:.4f}", _figure(each.recall_at_100),
            _figure(each.ndcg_at_10, 100, 2), f"{each.regret_at_10:.5f}",
            f"{each.lost_by_model:.4f} + {each.lost_by_code:.4f} + {each.lost_by_index:.4f}",
            f"{each.queries_per_second:,.0f}",
        ]
        for each in figures
    ]  # fmt: skip
    columns = (
        "model", "codec", "index", "bytes", "recall@1", "@10", "@100", "nDCG@10, % of FP32", "regret@10",
        "lost by model + code + index", "queries/s",
    )  # fmt: skip
    first = figures[0]
    console.put_table(
        columns, rows, f"against FP32's exact search: {first.queries:,} queries, {first.documents:,} documents"
    )


def _figure(value: float | None, factor: float = 1, digits: int = 4) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"
