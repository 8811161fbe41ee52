"""Attention that divides behind its product: every sum of a row has one level, and thin shares are not lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_integer import make_model

from edgeq.quantization.integer.deferred_softmax import LAST_INDEX, LEVELS, RATIO, table_of_inverses


def inverses(sums: np.ndarray) -> np.ndarray:
    """Give 1/S of whole numbers of codes as each level has it, float64[levels, sums]."""
    found = []
    for level in range(LEVELS):
        index = np.minimum(sums // RATIO**level, LAST_INDEX + 1)
        found.append((table_of_inverses(level)[index].astype(np.float64) + 128) / 255 / RATIO**level)
    return np.stack(found)


def test_each_sum_has_one_level_and_its_inverse() -> None:
    sums = np.arange(255, 255 * RATIO**LEVELS + 1)  # one weight is 1.0, and no more than 1,024 are
    found = inverses(sums)
    assert np.all((found > 0).sum(axis=0) == 1)
    assert np.abs(found.sum(axis=0) * sums / 255 - 1).max() < 0.0105  # half of one of 64 codes, and of one of 256


def test_a_sum_beyond_the_last_level_has_none() -> None:
    assert not inverses(np.array([256 * RATIO**LEVELS])).any()


@pytest.mark.parametrize("scheme", ["w8a8-int", "w8a16-int"])
def test_weights_fill_their_codes_and_no_softmax_is_left(scheme: str, tmp_path: Path) -> None:
    kinds = [node.op_type for node in onnx.load(make_model(scheme, tmp_path).file.path).graph.node]
    assert kinds.count("Exp") == 2 and "Softmax" not in kinds


@pytest.mark.tflite
def test_rows_longer_than_the_levels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    from edgeq.backends.tflite import deferred_softmax
    from edgeq.backends.tflite.emitter import Settings
    from edgeq.backends.tflite.lowering import lower_model
    from edgeq.errors import LoweringFailed

    model = ir.load(make_model("w8a8-int", tmp_path).file.path)
    settings = Settings(32, "quantize", "none")
    assert lower_model(model, (48,), settings)
    monkeypatch.setattr(deferred_softmax, "LAST_INDEX", 46)  # 48 weights of 255 codes each, over 4^4: 47
    with pytest.raises(LoweringFailed, match="no level holds sums of 48 weights; use shorter buckets"):
        lower_model(model, (48,), settings)
