"""Put the parts of one run beside those of another, each with the date, the machine and the versions of its own run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.figures import Figures
from benchmark.making import MINILM

RUN = ("date", "machine", "versions")
PARTS = "parts"  # part -> the run it comes from, where that is not the one in the heading
QUALITY = "quality"  # model -> its figures and the run that they come from


def merged(before: Figures, now: Figures, parts: Sequence[str], are_rows: bool = False) -> Figures:
    """Replace the parts that a run measured, and keep all others as they were.

    Args:
        before: what was written down earlier.
        now: a run.
        parts: those of its parts that are taken; they share no models with others, or say which run they come from.
        are_rows: whether it measured some rows of its parts only; the parts but quality keep their other rows.

    Raises:
        SystemExit: rows of a part come from another day, machine or version than those they would stand beside, or a
            part other than quality from another model.
    """
    run = {key: now[key] for key in RUN}
    measured = {part: now[part] for part in parts if part != QUALITY}
    of = before.get("model", MINILM)
    if measured and now.get("model", MINILM) != of:
        raise SystemExit(f"{', '.join(measured)}: the report is of {of}; quality alone stands beside other models' too")
    if are_rows:
        for part, figures in measured.items():
            if before.get(PARTS, {}).get(part) != run:
                raise SystemExit(f"{part} was measured elsewhere or on another day: measure all of it, without --row")
            measured[part] = {name: {**before[part][name], **rows} for name, rows in figures.items()}
    models = {**before.get(QUALITY, {}), **(now[QUALITY] if QUALITY in parts else {})}
    return {**before, **measured, QUALITY: models, PARTS: before.get(PARTS, {}) | dict.fromkeys(measured, run)}
