"""What is read off the statistics of one tensor."""

from __future__ import annotations

import numpy as np

from edgeq.calibration.statistics import LEAST_LARGEST, LEAST_MEDIAN, LEAST_OF_MEDIAN, Statistics


def statistics(minimum: list[float], maximum: list[float]) -> Statistics:
    return Statistics(np.array(minimum, np.float32), np.array(maximum, np.float32))


def test_a_magnitude_is_that_of_the_farther_end() -> None:
    seen = statistics([-3.0, 1.0, -5.0], [2.0, 4.0, -1.0])
    assert seen.magnitudes.tolist() == [3.0, 4.0, 5.0] and seen.magnitudes.dtype == np.float64
    assert seen.largest == 5.0 and statistics([2.0], [7.0]).largest == 7.0


def test_an_inactive_channel_counts_as_a_part_of_the_median() -> None:
    seen = statistics([0.0, -2.0, -4.0], [0.0, 2.0, 4.0])
    assert seen.active_magnitudes.tolist() == [LEAST_OF_MEDIAN * 2.0, 2.0, 4.0]
    np.testing.assert_array_equal(statistics([0.0] * 3, [0.0] * 3).active_magnitudes, LEAST_OF_MEDIAN * LEAST_MEDIAN)


def test_the_largest_of_nothing_still_makes_a_scale() -> None:
    assert statistics([0.0], [0.0]).largest == LEAST_LARGEST > 0.0
