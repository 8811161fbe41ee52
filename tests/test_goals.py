"""The judge of tools/bench must be able to say no."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil", reason="needs the extra `dev`")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from benchmark import clock, goals, making, rows  # noqa: E402
from benchmark.figures import Blank  # noqa: E402


def results(value: object) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for goal in goals.GOALS:
        place = made
        for key in goal.path[:-1]:
            place = place.setdefault(key, {})
        place[goal.path[-1]] = value
    return made


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.what)
def test_each_goal_is_met_at_its_limit_and_missed_beyond(goal: goals.Goal) -> None:
    limit = goal.at_least if goal.at_least is not None else goal.at_most
    assert limit is not None and (goal.at_least is None) != (goal.at_most is None)
    worse = -1e-6 if goal.at_least is not None else 1e-6
    assert goal.judge(results(limit)) == (limit, True)
    assert goal.judge(results(limit + worse)) == (limit + worse, False)
    judged = goal.judge(results(float("nan")))
    assert not isinstance(judged, Blank) and judged[1] is False


def test_a_ratio_is_judged_by_its_median() -> None:
    goal = next(goal for goal in goals.GOALS if goal.path[1] == "ratios" and goal.at_most is not None)
    assert goal.judge(results({"median": goal.at_most, "low": 0.0, "high": 9.0})) == (goal.at_most, True)
    assert goal.judge(results({"median": 9.0, "low": 0.0, "high": 9.0})) == (9.0, False)


def test_what_was_not_measured_is_not_met() -> None:
    assert {row[3] for row in goals.judged({"machine": "m"})} == {"not measured"}


def test_a_blank_is_not_met_and_says_why() -> None:
    judged = goals.judged(results(Blank("no such target")))
    assert {row[1] for row in judged} == {""}
    assert {row[3] for row in judged} == {"not measured: no such target"}


def test_a_model_that_is_blank_as_a_whole_leaves_its_goals_unmet() -> None:
    goal = next(goal for goal in goals.GOALS if goal.path[0] == "quality")
    assert goal.judge({"quality": {goal.path[1]: {"rows": {goal.path[3]: Blank("gone")}}}}) == Blank("gone")


def test_vectors_are_judged_by_centred_cosine_and_regret_alone() -> None:
    of_vectors = [goal.path[-1] for goal in goals.GOALS if "cosine" in goal.path[-1] or "regret" in goal.path[-1]]
    assert {"centred_cosine_mean", "centred_cosine_min", "regret_mean"} == set(of_vectors)
    assert not [goal for goal in goals.GOALS if "overlap" in goal.path[-1]]


def test_speed_and_size_of_another_model_meet_no_goal() -> None:
    found = goals.judged(results(1.0) | {"model": "all-mpnet-base-v2"})
    measured = [row[0] for row, goal in zip(found, goals.GOALS, strict=True) if row[3] != "not measured"]
    assert measured == [goal.what for goal in goals.GOALS if goal.path[0] == "quality"]
    assert {row[3] for row in goals.judged(results(1.0))} == {"met", "MISSED"}


def test_every_goal_names_what_the_tables_hold() -> None:
    models = {row.name for row in (*rows.OWN, *rows.PEERS, *rows.MIRRORS)}
    compiled = {row.name for row in rows.NPU}
    for goal in goals.GOALS:
        if goal.path[0] == "making":
            assert goal.path[1] in models
        if goal.path[0] == "quality":
            assert goal.path[1] in making.MODELS
            assert goal.path[2] in ("shared", "across") or (goal.path[2] == "rows" and goal.path[3] in models)
        if goal.path[0] == "npu":
            assert goal.path[1] in ("quality", "compiling", "estimates") and goal.path[2] in compiled
        if goal.path[:2] == ("latency", "ratios"):
            assert int(goal.path[2]) in clock.SEQUENCES and goal.path[3] in clock.RATIOS
    assert {name for pair in clock.RATIOS.values() for name in pair} <= models | {rows.FLOAT}
