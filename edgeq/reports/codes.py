"""Measure codes of the vectors that a card's runtimes give for a retrieval set, and queries of one in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeq.codecs.statistics import VectorStatistics, read_statistics
from edgeq.errors import ConfigError
from edgeq.reports.bundles import Found
from edgeq.reports.runs import FLOAT, Data, Run
from edgeq.vectors.measure import CodeFigures, Side, cross, measure, normalised, truth


def code_figures(
    runs: Sequence[Run], found: Sequence[Found], data: Data, codecs: Sequence[str]
) -> tuple[CodeFigures, ...]:
    """Measure every codec on FP32's and the artifacts' vectors, and floats with one's queries in another's documents.

    Args:
        runs: of the card, FP32 among them.
        found: the bundles.
        data: the retrieval set.
        codecs: names; none measures nothing.

    Raises:
        ConfigError: FP32 did not run, or a codec needs more documents.
    """
    if not codecs or data.retrieval is None:
        return ()
    names = {FLOAT, *(item.name for item in found)}
    sides = {
        run.runner.name: Side(run.runner.name, normalised(run.retrieved[1]), normalised(run.retrieved[0]))
        for run in runs
        if run.retrieved is not None and run.runner.name in names
    }
    if FLOAT not in sides:
        raise ConfigError("--codec: is measured against FP32, which did not run here. Give its file with --against.")
    ideal = truth(sides[FLOAT], data.retrieval.qrels)
    own = measure(ideal, list(sides.values()), list(codecs), ["exact"], _known(found))
    return (*own, *measure(ideal, _pairs(sides), ["float32"], ["exact"], None))


def _pairs(sides: Mapping[str, Side]) -> list[Side]:
    """Pair each one's queries with each other's documents."""
    return [
        cross(asking, holding) for one, asking in sides.items() for other, holding in sides.items() if one != other
    ]  # fmt: skip


def _known(found: Sequence[Found]) -> VectorStatistics | None:
    """Read the statistics of the first bundle that has some; all bundles of a model have the same."""
    paths = [Path(item.path) / item.manifest.codecs.path for item in found if item.manifest.codecs is not None]
    return read_statistics(paths[0]) if paths else None
