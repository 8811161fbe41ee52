"""Compare running times by turns: the median of paired ratios, with the sign test's interval for a median.

Models that are timed one after the other are compared under the load of different moments. Here all stay loaded and
take turns, in rounds that run forward and back (A B, B A), so that what slows the machine for a while slows both, and a
steady drift cancels. One pair is two neighbouring rounds: the geometric mean of its two ratios.

The interval is the one by order statistics (W. J. Conover, Practical Nonparametric Statistics, 3rd edition, section
3.2): it assumes nothing of the distribution of the ratios but that pairs are independent.

This file needs the standard library alone, and Python 3.8: `tools/device_script` copies what follows the imports into
the device script.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

LEVEL = 0.99  # of intervals: a table has a dozen of them, and none should tell a difference by chance
SMALLEST_DIFFERENCE = 1.03  # a margin: two processes of one file differ, too, by their addresses and cores
WIDEST_INTERVAL = 1.25  # high over low; beyond it, the machine was too busy to tell how large a difference is

_TURN_MS, _MOST_RUNS = 20.0, 10

_Name = TypeVar("_Name", bound=str)

FASTER, SLOWER, NOT_TOLD_APART = "faster", "slower", "not told apart"
NOISY = "noisy: repeat on an idle machine"
TOO_FEW = "too few rounds for an interval"


class Interval(NamedTuple):
    """Hold a median of `size` values and its interval; low and high are None where the values are too few for one."""

    size: int
    median: float
    low: float | None
    high: float | None
    level: float


class Turns(NamedTuple):
    """Hold one model's times in milliseconds: the median of each round that counted, and every run of these rounds."""

    rounds_ms: tuple[float, ...]
    runs_ms: tuple[float, ...]


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Compute a median and the sign test's interval for it, which lies between two of the values.

    The interval holds the true median with a probability of at least `level`: rank r from below and from above, for the
    largest r with P(Binomial(n, 1/2) < r) <= (1 - level) / 2.

    Args:
        values: independent, at least one.
        level: of the interval, above 0 and below 1.
    """
    ordered = sorted(values)
    count, rank, outside = len(ordered), 0, 0
    while True:
        outside += math.comb(count, rank)
        if outside > (1.0 - level) / 2.0 * 2**count:
            break
        rank += 1
    low, high = (ordered[rank - 1], ordered[count - rank]) if rank else (None, None)
    return Interval(count, statistics.median(ordered), low, high, level)


def paired_ratios(first_ms: Sequence[float], second_ms: Sequence[float]) -> list[float]:
    """Divide the second's times by the first's, and give the geometric mean over each two rounds, forward and back.

    Args:
        first_ms: of each round.
        second_ms: of the same rounds; a last round without its way back is left out.
    """
    ratios = [second / first for first, second in zip(first_ms, second_ms)]
    return [math.sqrt(forth * back) for forth, back in zip(ratios[::2], ratios[1::2])]


def paired_differences(first_ms: Sequence[float], second_ms: Sequence[float]) -> list[float]:
    """Subtract the first's times from the second's, in milliseconds, and give the mean over each two rounds.

    Args:
        first_ms: of each round.
        second_ms: of the same rounds; a last round without its way back is left out.
    """
    differences = [second - first for first, second in zip(first_ms, second_ms)]
    return [(forth + back) / 2.0 for forth, back in zip(differences[::2], differences[1::2])]


def verdict(found: Interval) -> str:
    """Say in words what an interval of ratios (the other's time over this one's) tells: faster, slower, or nothing."""
    if found.low is None or found.high is None:
        return TOO_FEW
    is_noisy = found.high / found.low > WIDEST_INTERVAL
    if found.low > SMALLEST_DIFFERENCE:
        told = FASTER
    elif found.high < 1.0 / SMALLEST_DIFFERENCE:
        told = SLOWER
    else:
        told = NOT_TOLD_APART
    if not is_noisy:
        return told
    return f"too {NOISY}" if told == NOT_TOLD_APART else f"{told}, {NOISY}"


def order_of(names: Sequence[_Name], round_number: int) -> list[_Name]:
    """Give the order of turns in a round: forward, then back; each pair of rounds begins with another model.

    Who is last in a round is first in the next and finds its caches warm: that advantage, too, must go around.
    """
    start = round_number // 2 % len(names)
    forward = [*names[start:], *names[:start]]
    return forward[::-1] if round_number % 2 else forward


def take_turns(
    players: Mapping[_Name, Callable[[int, int], Sequence[float]]],
    rounds: int,
    warmup_rounds: int,
    failures: tuple[type[Exception], ...] = (),
) -> tuple[dict[_Name, Turns], dict[_Name, Exception]]:
    """Time models that stay loaded by turns: some short runs of each in every round.

    The rounds before those that count also tell how many runs fill a turn. A short turn begins with a run that is not
    timed: the other models have emptied the caches.

    Args:
        players: name -> a function of how many runs are timed, and how many are not and stand before them; it gives
            the milliseconds of each timed run.
        rounds: that count; rounded up to an even number.
        warmup_rounds: before them.
        failures: the errors that put one model out and let the others go on; any other error ends all.

    Returns:
        The times of each model that stayed to the end, and the error of each that did not.
    """
    first_ms: dict[_Name, list[float]] = {name: [] for name in players}
    rounds_ms: dict[_Name, list[float]] = {name: [] for name in players}
    runs_ms: dict[_Name, list[float]] = {name: [] for name in players}
    failed: dict[_Name, Exception] = {}
    last = warmup_rounds + rounds + rounds % 2
    for number in range(-warmup_rounds, last - warmup_rounds):
        for name in order_of(list(players), number):
            if name in failed:
                continue
            runs, untimed = _length_of_turn(first_ms[name]) if number >= 0 else (1, 0)
            try:
                found = [float(value) for value in players[name](runs, untimed)]
            except failures as error:
                failed[name] = error
                continue
            if number < 0:
                first_ms[name] += found
                continue
            rounds_ms[name].append(statistics.median(found))
            runs_ms[name] += found
    done = {name: Turns(tuple(rounds_ms[name]), tuple(runs_ms[name])) for name in players if name not in failed}
    return done, failed


def _length_of_turn(first_ms: Sequence[float]) -> tuple[int, int]:
    """Say how many timed runs make a turn, and how many untimed ones stand before them."""
    if not first_ms:
        return 1, 0
    run_ms = statistics.median(first_ms)
    if run_ms >= _TURN_MS:
        return 1, 0
    return min(_MOST_RUNS, math.ceil(_TURN_MS / max(run_ms, 1e-3))), 1
