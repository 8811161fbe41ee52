"""Define the callbacks by which long-running stages say how far they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)
StageProgress = Callable[[int, int], None]  # (steps done, steps in all) of one stage


def silent(stage: str, done: int, total: int) -> None:
    """Ignore progress; the default where nobody watches."""
