"""The judge of tools/bench must be able to say no."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil", reason="needs the extra `dev`")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import benchmark  # noqa: E402


def results(value: float) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for goal in benchmark.GOALS:
        place = made
        for key in goal.path[:-1]:
            place = place.setdefault(key, {})
        place[goal.path[-1]] = value
    return made


@pytest.mark.parametrize("goal", benchmark.GOALS, ids=lambda goal: goal.what)
def test_each_goal_is_met_at_its_limit_and_missed_beyond(goal: benchmark.Goal) -> None:
    limit = goal.at_least if goal.at_least is not None else goal.at_most
    assert limit is not None and (goal.at_least is None) != (goal.at_most is None)
    worse = -1e-6 if goal.at_least is not None else 1e-6
    assert goal.judge(results(limit)) == (limit, True)
    assert goal.judge(results(limit + worse)) == (limit + worse, False)
    assert goal.judge(results(float("nan")))[1] is False


def test_what_was_not_measured_is_not_met() -> None:
    assert {row[3] for row in benchmark.judged({"machine": "m"})} == {"not measured"}
