"""Codes against their definition, over every code."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.quantization import affine


@pytest.mark.parametrize(("bits", "signed"), [(8, False), (8, True), (4, False), (16, True), (16, False)])
@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-5.0, 0.0), (0.5, 2.0), (-7.0, -2.0), (-1e-3, 250.0)]
)
def test_every_code_comes_back(bits: int, signed: bool, low: float, high: float) -> None:
    codes = affine.asymmetric(low, high, bits, signed)
    every = np.arange(codes.low, codes.high + 1)
    assert np.array_equal(affine.quantize(affine.dequantize(every, codes), codes), every)
    assert affine.dequantize(codes.zero_point, codes) == 0.0


def test_error_is_at_most_half_a_step_inside_and_saturates_outside() -> None:
    codes = affine.asymmetric(-1.0, 3.0)
    values = np.linspace(-1.0, 3.0, 10_001, dtype=np.float32)
    error = np.abs(affine.dequantize(affine.quantize(values, codes), codes) - values)
    assert error.max() <= codes.scale / 2 * 1.01
    assert affine.quantize([-9.0, 9.0], codes).tolist() == [0, 255]


def test_rounds_half_to_even() -> None:
    codes = affine.Affine(1.0, 0, -128, 127)
    assert affine.quantize([0.5, 1.5, 2.5, -0.5, -1.5], codes).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_refuses_what_is_no_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="no range"):
        affine.asymmetric(low, high)


def test_symmetric_scale_of_an_empty_channel_is_one() -> None:
    assert affine.symmetric_scales([0.0, 127.0], 8).tolist() == [1.0, 1.0]
    assert affine.symmetric_scales([63.0], 7).tolist() == [1.0]


def test_significant_bits_are_kept_and_the_others_rounded() -> None:
    values = np.array([1.0, -0.75, 1025.0, 1027.0, 3e-7, 0.0])
    found = affine.significant(values, 10)
    assert found[:4].tolist() == [1.0, -0.75, 1024.0, 1028.0] and found[5] == 0.0
    assert np.abs(found[4] / values[4] - 1).max() <= 2.0**-10
    assert (affine.significant(found, 10) == found).all()
    assert affine.significant(np.array([2047.5]), 11).tolist() == [2048.0]
