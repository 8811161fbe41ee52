"""Take one small model of each kind of architecture, with planted outliers, through the backends that run here.

tools/architectures measures all of them for docs/reference/architectures.md; here are those that differ in their graph.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import architectures  # noqa: E402
import measured_architecture as measured  # noqa: E402

from edgeq.data.tokens import Feeds  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = json.loads((REPOSITORY / "docs" / "measured" / "architectures.json").read_text(encoding="utf-8"))

# name -> what its graph has that no other here has
KINDS = {
    "roberta": "positions counted from tokens",
    "mpnet": "bias by distance",
    "albert": "narrow embeddings, shared weights, GELU by tanh",
    "modernbert": "rotation, local attention, joint products, gates",
    "t5": "mean square, bias by distance, no biases",
    "qwen3": "normalised queries, shared heads, causal attention, the last token",
    "gemma": "local attention both ways, scaled table, norms around blocks",
    "deberta-v3": "products by distance, tokens multiplied by the mask",
    "bert-mish": "Mish",
}
RELATIVE = frozenset({"modernbert", "t5", "qwen3", "gemma"})


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest,
    exported_architecture: Callable[[str], measured.Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[measured.Exported, Path]:
    return exported_architecture(request.param), tmp_path_factory.mktemp(request.param)


def test_the_float_model_gives_the_vectors_of_torch(made: tuple[measured.Exported, Path]) -> None:
    assert made[0].error < 1e-5
    if made[0].name in RELATIVE:  # and no table grows with the longest text: it takes three times as long a one
        ids = np.tile(np.arange(2, 42, dtype=np.int64), 5)[None]
        vectors = FloatSession.of(made[0].model)(Feeds(ids, np.ones_like(ids)))
        assert np.isfinite(vectors).all() and vectors.shape == (1, made[0].record.dim)


def test_onnx_runtime_keeps_the_neighbours(made: tuple[measured.Exported, Path]) -> None:
    _require_close(made[0].name, measured.lowered(made[0], "ONNX Runtime", made[1]))


@pytest.mark.openvino
def test_openvino_keeps_the_neighbours(made: tuple[measured.Exported, Path]) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    _require_close(made[0].name, measured.lowered(made[0], "OpenVINO", made[1]))


@pytest.mark.tflite
def test_litert_runs_it_in_integers_or_says_why_not(made: tuple[measured.Exported, Path]) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    found = measured.lowered(made[0], "LiteRT", made[1])
    assert found["form"] == RESULTS[made[0].name]["columns"]["LiteRT"]["form"], found
    if found["form"] == "integer":
        _require_close(made[0].name, found)


@pytest.mark.qnn
def test_htp_takes_it_whole_and_its_emulator_keeps_the_neighbours(made: tuple[measured.Exported, Path]) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")
    _require_close(made[0].name, measured.lowered(made[0], "Qualcomm HTP", made[1], texts=16))
    found = measured.lowered(made[0], "Qualcomm HTP", made[1], "snapdragon-8-gen-3-w8a8", texts=16)
    assert found["form"] == "integer" and "check_differs" not in found, found
    found = measured.lowered(made[0], "Qualcomm HTP", made[1], "qualcomm-v68", texts=16)  # the oldest of all
    assert found["form"] == "integer" and "check_differs" not in found, found


def _require_close(name: str, found: dict[str, object]) -> None:
    assert "check_differs" not in found, found
    assert found["form"] != "refused", found
    assert found["centred"] >= measured.CENTRED_MIN, found
    assert found["regret"] <= measured.REGRET_MAX, found


def test_swapped_rows_and_one_vector_for_all_fail_both_measures() -> None:
    rng = np.random.default_rng(0)
    vectors = 5.0 + rng.standard_normal((64, 16))  # as random encoders': all alike but for little
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    same = {"centred": 1.0, "centred_min": 1.0, "regret": 0.0}
    assert measured.nearness(vectors, vectors) == pytest.approx(same, abs=1e-6)
    swapped = vectors[np.r_[1, 0, 3, 2, 4:64]]
    constant = np.repeat(vectors[:1], 64, axis=0)
    for damaged in (swapped, constant):
        assert np.mean((vectors * damaged).sum(1)) > 0.95  # plain cosine does not see it
        found = measured.nearness(vectors, damaged)
        assert found["centred"] < measured.CENTRED_MIN and found["regret"] > measured.REGRET_MAX, found


def test_the_table_says_what_was_measured_of_all_architectures() -> None:
    assert set(RESULTS) <= set(architectures.ARCHITECTURES) and len(RESULTS) >= 18
    for name, result in RESULTS.items():
        for column in ("ONNX Runtime", "OpenVINO"):
            _require_close(name, result["columns"][column])
    assert subprocess.run([sys.executable, str(REPOSITORY / "tools" / "architectures"), "--check"]).returncode == 0
