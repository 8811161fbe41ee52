"""Put the parts of one run beside those of another, each with the date, the machine and the versions of its own run."""

from __future__ import annotations

from benchmark.figures import Figures

RUN = ("date", "machine", "versions")
PARTS = "parts"  # part -> the run it comes from, where that is not the one in the heading


def merged(before: Figures, now: Figures) -> Figures:
    """Replace the parts that a run measured, and keep all others as they were.

    Args:
        before: what was written down earlier.
        now: a run of parts that share no models with others.
    """
    run = {key: now[key] for key in RUN}
    measured = {key: value for key, value in now.items() if key not in RUN}
    return {**before, **measured, PARTS: before.get(PARTS, {}) | dict.fromkeys(measured, run)}
