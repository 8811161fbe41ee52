"""LiteRT on an emulated 64-bit Arm gives x86's codes, and `tools/arm64_compare.py` says when it does not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import GATE, PAD_ID, TEXTS, make_config, make_lineage, make_model, make_report, make_target
from tiny_tflite import VOCABULARY, make_tflite

from edgeq.bundle.golden import GoldenData
from edgeq.bundle.write import write
from edgeq.system.files import file_ref

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import arm64_compare  # noqa: E402

pytestmark = [
    pytest.mark.arm64,
    pytest.mark.skipif(
        not os.environ.get("EDGEQ_ARM64"),
        reason="run it with EDGEQ_ARM64=1: fetches 60 MB into .arm64/ once, and needs qemu-user-static and debootstrap",
    ),
]
LENGTHS = (16, 32)


@pytest.fixture(scope="module")
def arm() -> list[str]:
    pytest.importorskip("ai_edge_litert", reason="pip install ai-edge-litert: x86's codes are compared with Arm's")
    done = subprocess.run([TOOLS / "arm64", "setup"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [str(TOOLS / "arm64"), "run"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, arm: list[str]) -> Path:
    path = tmp_path_factory.mktemp("arm64") / "model.tflite"
    path.write_bytes(make_tflite(LENGTHS))
    return path


@pytest.fixture(scope="module")
def golden(model: Path) -> GoldenData:
    random = np.random.default_rng(0)
    lengths = [3, 5, 16, 17, 32, 9, 30, 40] * 4
    ids = random.integers(1, VOCABULARY, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    unknown = np.zeros((len(lengths), 1), np.float32)
    made = GoldenData(TEXTS, np.where(mask == 1, ids, PAD_ID), mask, unknown, unknown, PAD_ID)
    codes, _ = arm64_compare.run_child([sys.executable], model, arm64_compare.bucket_feeds(made, LENGTHS)[0])
    vectors = codes.vectors()
    noise = random.standard_normal(vectors.shape).astype(np.float32) * vectors.std() * np.float32(0.05)
    return dataclasses.replace(made, reference=vectors + noise, embeddings=vectors)


def make_bundle(folder: Path, model: Path, golden: GoldenData) -> Path:
    artifact, config = folder / "artifact", folder / "config"
    make_model(artifact / "onnx" / "model.onnx")
    make_config(config)
    target = make_target(backend="tflite", buckets_tokens=LENGTHS, gate=GATE, runtime={"interpreter": "litert"})
    lineage = make_lineage(artifact, target)
    (artifact / "onnx" / "model.onnx").unlink()
    (artifact / "model.tflite").write_bytes(model.read_bytes())
    files = (file_ref(artifact / "model.tflite", artifact),)
    longest = {
        name: getattr(lineage, name).model_copy(update={"max_sequence": golden.input_ids.shape[1]})
        for name in ("source", "float_model", "equalized_model", "qdq_model")
    }
    artifact_record = lineage.artifact.model_copy(update={"files": files})
    lineage = dataclasses.replace(lineage, artifact=artifact_record, **longest)
    write(folder / "out", lineage, artifact, config, golden, make_report(target), overwrite=False)
    return folder / "out"


def compare(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "arm64_compare.py"), str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_child_gives_the_same_codes_on_both_architectures(arm: list[str], model: Path, golden: GoldenData) -> None:
    feeds, _ = arm64_compare.bucket_feeds(golden, LENGTHS)
    here, where_here = arm64_compare.run_child([sys.executable], model, feeds)
    there, where_there = arm64_compare.run_child(arm, model, feeds)
    assert where_there["machine"] == "aarch64" and where_here["machine"] != "aarch64"
    assert here.codes.std() > 10 and len(np.unique(here.codes, axis=0)) == len(here.codes)
    assert np.abs(here.codes.astype(int) - there.codes).max() <= 1
    assert np.array_equal(here.scale, there.scale) and np.array_equal(here.zero_point, there.zero_point)


def test_a_bundle_is_compared_with_x86_and_with_float32(tmp_path: Path, model: Path, golden: GoldenData) -> None:
    path = make_bundle(tmp_path, model, golden)
    done = compare(path, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["texts"], document["texts_cut"], document["ran_on"]) == (32, 4, "emulator")
    assert document["centred_cosine_x86_mean"] > 0.9999 and document["code_difference_max"] <= 1
    assert 0.99 < document["centred_cosine_float32_mean"] < 0.9999
    assert not [key for key in document if key.endswith("_ms") or "latency" in key]
    table = compare(path)
    assert table.returncode == 0 and "emulator" in table.stdout and "FP32" in table.stdout


def test_vectors_of_other_texts_miss_the_limit(tmp_path: Path, model: Path, golden: GoldenData) -> None:
    swapped = dataclasses.replace(golden, embeddings=np.roll(golden.embeddings, 1, axis=0))
    done = compare(make_bundle(tmp_path, model, swapped), "--json")
    assert done.returncode == 6, done.stderr
    assert json.loads(done.stdout)["status"] == "failed" and "0.997 is needed" in done.stderr


def test_a_missing_signature_is_named(arm: list[str], model: Path, golden: GoldenData) -> None:
    feeds, _ = arm64_compare.bucket_feeds(golden, (16, 64))
    with pytest.raises(arm64_compare.LoweringFailed, match=r"'seq_16', 'seq_32'.*seq_64 is needed"):
        arm64_compare.run_child(arm, model, feeds)
