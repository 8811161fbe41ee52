"""Ratios of times by turns: the interval holds what it should, drift cancels, and the words say what is told."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeq.evaluation.paired_times import (
    FASTER,
    NOT_TOLD_APART,
    SLOWER,
    TOO_FEW,
    Interval,
    median_interval,
    order_of,
    paired_differences,
    paired_ratios,
    take_turns,
    verdict,
)

REPOSITORY = Path(__file__).resolve().parent.parent


class Machine:
    """Let models run on a machine whose load wanders: a clock that each run moves on."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._load = 0.0
        self.log: list[tuple[str, int, int]] = []

    def model(self, name: str, run_ms: float):  # type: ignore[no-untyped-def]
        def turn(runs: int, untimed: int) -> list[float]:
            self.log.append((name, runs, untimed))
            return [self._run(run_ms) for _ in range(untimed + runs)][untimed:]

        return turn

    def _run(self, run_ms: float) -> float:
        self._load = 0.98 * self._load + self._rng.normal(0.0, 0.1)
        spike = 3.0 if self._rng.random() < 0.1 else 1.0
        return run_ms * float(np.exp(self._load + self._rng.normal(0.0, 0.1))) * spike


# Source of the ranks: the sign test's table for the median.
@pytest.mark.parametrize(
    ("level", "count", "rank"),
    [
        *((0.95, *pair) for pair in [(6, 1), (9, 2), (10, 2), (25, 8), (30, 10), (50, 18), (100, 40)]),
        *((0.99, *pair) for pair in [(8, 1), (10, 1), (25, 6), (30, 8), (40, 12), (50, 16), (100, 37)]),
    ],
)
def test_the_interval_lies_between_the_ranks_of_the_sign_test(level: float, count: int, rank: int) -> None:
    values = np.random.default_rng(count).permutation(np.arange(1.0, count + 1)).tolist()
    found = median_interval(values, level)
    assert (found.low, found.high) == (rank, count + 1 - rank)
    assert (found.size, found.median, found.level) == (count, statistics.median(values), level)


def test_seven_values_are_too_few_for_an_interval() -> None:
    found = median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert (found.low, found.high, found.median) == (None, None, 4.0)
    assert verdict(found) == TOO_FEW


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Of skewed values with spikes: the mean's interval would not."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        found = median_interval(np.exp(rng.standard_normal(30) * 0.2).tolist(), 0.95)
        held += found.low <= 1.0 <= found.high  # type: ignore[operator]
    assert 945 <= held <= 975  # ranks 10 and 21 of 30 hold it in 95.7 %


def test_drift_and_the_place_in_a_round_cancel() -> None:
    """Each run is 1 % slower than the one before, and whoever is second in a round takes 1.5 times as long."""
    clock, first, second = 1.0, [], []
    for number in range(20):
        for place, name in enumerate(order_of(["first", "second"], number)):
            clock *= 1.01
            (first if name == "first" else second).append((2.0 if name == "second" else 1.0) * clock * (1 + place / 2))
    assert paired_ratios(first, second) == pytest.approx([2.0] * 10)
    one_way = [b / a for a, b in zip(first, second, strict=True)]
    assert max(one_way) > 2.9 and min(one_way) < 1.4


def test_a_last_round_without_its_way_back_is_left_out() -> None:
    assert paired_ratios([1.0, 1.0, 1.0], [4.0, 1.0, 9.0]) == [2.0]
    assert paired_differences([1.0, 1.0, 1.0], [4.0, 1.0, 9.0]) == [1.5]


def test_every_model_is_first_in_its_turn() -> None:
    assert ["".join(order_of("ABC", number)) for number in range(8)] == [
        "ABC", "CBA", "BCA", "ACB", "CAB", "BAC", "ABC", "CBA",
    ]  # fmt: skip
    assert ["".join(order_of("AB", number)) for number in range(4)] == ["AB", "BA", "BA", "AB"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.9, 2.1, FASTER),
        (0.4, 0.45, SLOWER),
        (0.97, 1.04, NOT_TOLD_APART),
        (1.005, 1.015, NOT_TOLD_APART),  # within the margin for two processes of one file
        (1.02, 1.2, NOT_TOLD_APART),
        (0.9, 1.2, "too noisy: repeat on an idle machine"),
        (1.5, 2.5, "faster, noisy: repeat on an idle machine"),
        (0.3, 0.6, "slower, noisy: repeat on an idle machine"),
    ],
)
def test_the_words_say_what_the_interval_tells(low: float, high: float, words: str) -> None:
    assert verdict(Interval(30, (low + high) / 2, low, high, 0.95)) == words


def test_equal_models_are_not_told_apart_where_runs_one_after_the_other_are() -> None:
    held, told, apart = 0, 0, 0
    for seed in range(40):
        machine = Machine(seed)
        times, failed = take_turns({name: machine.model(name, 5.0) for name in "AB"}, 80, 4)
        found = median_interval(paired_ratios(times["A"].rounds_ms, times["B"].rounds_ms))
        assert failed == {} and found.low is not None and found.high is not None
        told += verdict(found).split(",")[0] in (FASTER, SLOWER)
        held += found.low <= 1.0 <= found.high
        one, other = (statistics.median(machine.model(name, 5.0)(50, 10)) for name in "AB")
        apart += not 0.9 < other / one < 1.1
    assert held >= 38 and told == 0 and apart > 20


def test_a_difference_is_told_with_the_right_ratio() -> None:
    machine = Machine(7)
    times, _ = take_turns({"int8": machine.model("int8", 5.0), "float": machine.model("float", 10.0)}, 60, 4)
    found = median_interval(paired_ratios(times["int8"].rounds_ms, times["float"].rounds_ms))
    assert found.low is not None and found.high is not None and found.size == 30
    assert found.low < 2.0 < found.high and verdict(found).startswith(FASTER)


def test_short_runs_fill_a_turn_and_long_ones_have_it_alone() -> None:
    turns = {"short": lambda runs, untimed: [4.0] * runs, "long": lambda runs, untimed: [50.0] * runs}
    times, _ = take_turns(turns, 6, 2)
    assert (len(times["short"].runs_ms), len(times["short"].rounds_ms)) == (30, 6)
    assert (len(times["long"].runs_ms), len(times["long"].rounds_ms)) == (6, 6)


def test_warm_up_does_not_count_and_rounds_are_even() -> None:
    calls = iter(range(1, 100))
    times, _ = take_turns({"one": lambda runs, untimed: [100.0 + next(calls)] * runs}, 3, 2)
    assert times["one"].rounds_ms == (103.0, 104.0, 105.0, 106.0)
    cold, _ = take_turns({"one": lambda runs, untimed: [1.0] * runs}, 1, 0)
    assert cold["one"].rounds_ms == (1.0, 1.0)


def test_a_model_that_fails_leaves_the_others_in_their_rounds() -> None:
    def dies(runs: int, untimed: int) -> list[float]:
        raise OSError("it died")

    machine = Machine(0)
    players = {"A": machine.model("A", 5.0), "B": dies, "C": machine.model("C", 5.0)}
    times, failed = take_turns(players, 6, 2, (OSError,))
    assert set(times) == {"A", "C"} and str(failed["B"]) == "it died"
    assert len(times["A"].rounds_ms) == len(times["C"].rounds_ms) == 6
    with pytest.raises(OSError, match="it died"):
        take_turns(players, 6, 2)


def generated(root: Path, *options: str) -> int:
    command = [sys.executable, root / "tools" / "device_script", *options]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_the_device_script_has_this_file_s_text() -> None:
    assert generated(REPOSITORY, "--check") == 0, "run tools/device_script"


def test_a_device_script_with_other_text_is_found_and_made_anew(tmp_path: Path) -> None:
    copied = ("edgeq/evaluation/paired_times.py", "edgeq/evaluation/vector_measures.py")
    for name in (*copied, "tools/device/validate.py", "tools/device_script"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    script, source = tmp_path / "tools/device/validate.py", tmp_path / "edgeq/evaluation/paired_times.py"
    before = script.read_text(encoding="utf-8")
    for path, old, new in ((script, "LEVEL = 0.99", "LEVEL = 0.9"), (source, "LEVEL = 0.99", "LEVEL = 0.999")):
        assert old in path.read_text(encoding="utf-8")
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        assert generated(tmp_path, "--check") == 1
        assert generated(tmp_path) == generated(tmp_path, "--check") == 0
        assert (script.read_text(encoding="utf-8") == before) == (path == script)
    script.write_text(before.replace("# --- paired times", "# --- times"), encoding="utf-8")
    assert generated(tmp_path) == 2
