"""What `tools/arm64_compare.py` computes around the emulation; what runs in it is in test_arm64.py."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import make_bundle, make_target

from edgeq.bundle.golden import GoldenData
from edgeq.data.sessions import unit
from edgeq.errors import ParityFailed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import arm64_compare  # noqa: E402

TEXTS, DIM, SCALE = 8, 32, np.float32(0.01)
Codes = arm64_compare.Codes


def make_codes(offset: int = 3) -> Codes:
    codes = np.random.default_rng(0).integers(-100, 100, (TEXTS, DIM)).astype(np.int8)
    return Codes(codes, np.full(TEXTS, SCALE), np.full(TEXTS, offset))


def make_golden(codes: Codes) -> GoldenData:
    nothing = np.zeros((TEXTS, 1), np.int64)
    vectors = codes.vectors()
    return GoldenData(("text",) * TEXTS, nothing, nothing, vectors * np.float32(2.0), vectors, 0)


def test_texts_go_into_the_smallest_length_that_holds_them_and_cut_ones_keep_their_end() -> None:
    ids = np.array([[5, 6, 9, 0, 0, 0], [0, 0, 5, 7, 8, 9], [5, 1, 2, 3, 4, 9]], np.int64)
    mask = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], np.int64)
    vectors = np.ones((3, 2), np.float32)
    golden = GoldenData(("a", "b", "c"), ids, mask, vectors, vectors, pad_id=77)
    arrays, cut = arm64_compare.bucket_feeds(golden, (3, 5))
    assert cut == 1
    assert arrays["rows_3"].tolist() == [0] and arrays["rows_5"].tolist() == [1, 2]
    assert arrays["input_ids_3"].tolist() == [[5, 6, 9]]
    assert arrays["input_ids_5"].tolist() == [[5, 7, 8, 9, 77], [5, 1, 2, 3, 9]]
    assert arrays["attention_mask_5"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert {array.dtype for name, array in arrays.items() if "rows" not in name} == {np.dtype(np.int32)}


def test_equal_codes_pass_and_one_step_is_seen() -> None:
    codes = make_codes()
    figures = arm64_compare.measure(make_golden(codes), codes)
    assert figures.code_difference_max == 0 and figures.centred_cosine_x86_min == pytest.approx(1.0)
    assert arm64_compare.failure(figures) is None
    moved = codes.codes.copy()
    moved[2, 3] += 1
    assert arm64_compare.measure(make_golden(codes), dataclasses.replace(codes, codes=moved)).code_difference_max == 1


def test_vectors_that_are_no_codes_have_no_difference_of_codes() -> None:
    codes = make_codes()
    golden = make_golden(codes)
    golden = dataclasses.replace(golden, embeddings=golden.embeddings * np.float32(0.737))
    figures = arm64_compare.measure(golden, codes)
    assert figures.code_difference_max is None and figures.centred_cosine_x86_min == pytest.approx(1.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda codes: dataclasses.replace(codes, codes=np.roll(codes.codes, 1, axis=0)),
        lambda codes: dataclasses.replace(codes, codes=np.roll(codes.codes, 1, axis=1)),
        lambda codes: dataclasses.replace(codes, codes=np.negative(codes.codes)),
        lambda codes: dataclasses.replace(codes, codes=np.full_like(codes.codes, 5)),
        lambda codes: dataclasses.replace(codes, zero_point=codes.zero_point + 20),
    ],
    ids=["swapped rows", "swapped columns", "flipped sign", "constant", "wrong zero point"],
)
def test_wrong_vectors_miss_the_limit(damage: Callable[[Codes], Codes]) -> None:
    codes = make_codes()
    problem = arm64_compare.failure(arm64_compare.measure(make_golden(codes), damage(codes)))
    assert problem is not None and "0.997 is needed" in problem


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda codes: dataclasses.replace(codes, codes=codes.codes[:, :-1]), "shape"),
        (lambda codes: dataclasses.replace(codes, codes=codes.codes[:-1]), "shape"),
        (lambda codes: dataclasses.replace(codes, scale=codes.scale * np.float32("nan")), "scale"),
        (lambda codes: dataclasses.replace(codes, codes=np.full_like(codes.codes, 3)), "text 1: its vector is zero"),
    ],
    ids=["a column less", "a text less", "NaN", "zero"],
)
def test_what_cannot_be_compared_is_refused(damage: Callable[[Codes], Codes], message: str) -> None:
    codes = make_codes()
    with pytest.raises(ParityFailed, match=message):
        arm64_compare.measure(make_golden(codes), damage(codes))


def test_swapped_rows_of_vectors_that_all_point_one_way_miss_the_limit() -> None:
    codes = make_codes()
    alike = dataclasses.replace(codes, codes=(codes.codes // 20 + 100).astype(np.int8))
    swapped = dataclasses.replace(alike, codes=np.roll(alike.codes, 1, axis=0))
    golden = make_golden(alike)
    assert arm64_compare.failure(arm64_compare.measure(golden, alike)) is None
    assert (unit(golden.embeddings) * unit(swapped.vectors())).sum(1).mean() > arm64_compare.COSINE_MEAN_MIN
    assert arm64_compare.failure(arm64_compare.measure(golden, swapped)) is not None


def test_nan_meets_no_limit() -> None:
    codes = make_codes()
    figures = arm64_compare.measure(make_golden(codes), codes)
    assert arm64_compare.failure(dataclasses.replace(figures, centred_cosine_x86_mean=float("nan"))) is not None


@pytest.mark.parametrize(
    ("changes", "message"), [({}, "'tflite' is needed"), ({"backend": "tflite"}, "no buckets_tokens")]
)
def test_other_bundles_are_refused_before_anything_is_fetched(
    tmp_path: Path, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, _ = make_bundle(tmp_path / "out", target=make_target(**changes))
    monkeypatch.setattr(sys, "argv", ["arm64_compare.py", str(path)])
    assert arm64_compare.main() == 2
    assert message in capsys.readouterr().err


def test_an_emulation_that_cannot_be_set_up_is_a_missing_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make_bundle(tmp_path / "out", target=make_target(backend="tflite", buckets_tokens=(12,)))
    (tmp_path / "arm64").write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    (tmp_path / "arm64").chmod(0o755)
    monkeypatch.setattr(arm64_compare, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["arm64_compare.py", str(path)])
    assert arm64_compare.main() == 3
    assert "not set up" in capsys.readouterr().err
