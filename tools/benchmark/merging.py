"""Put the parts of one run beside those of another, each with the date, the machine and the versions of its own run."""

from __future__ import annotations

from benchmark.figures import Figures

RUN = ("date", "machine", "versions")
PARTS = "parts"  # part -> the run it comes from, where that is not the one in the heading


def merged(before: Figures, now: Figures, are_rows: bool = False) -> Figures:
    """Replace the parts that a run measured, and keep all others as they were.

    Args:
        before: what was written down earlier.
        now: a run of parts that share no models with others.
        are_rows: whether it measured some rows of its parts only; the parts keep their other rows.

    Raises:
        SystemExit: rows of a part come from another day, machine or version than those they would stand beside.
    """
    run = {key: now[key] for key in RUN}
    measured = {key: value for key, value in now.items() if key not in RUN}
    if are_rows:
        for part, figures in measured.items():
            if before.get(PARTS, {}).get(part) != run:
                raise SystemExit(f"{part} was measured elsewhere or on another day: measure all of it, without --row")
            measured[part] = {name: {**before[part][name], **rows} for name, rows in figures.items()}
    return {**before, **measured, PARTS: before.get(PARTS, {}) | dict.fromkeys(measured, run)}
