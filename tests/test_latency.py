from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import DIM, MAX_SEQUENCE, WORDS, make_bundle, make_model

from edgeq import errors
from edgeq.bundle import benchmark
from edgeq.bundle.benchmark import Shapes
from edgeq.bundle.benchmark_child import Job, Sample
from edgeq.bundle.manifest import load_manifest
from edgeq.errors import ConfigError
from edgeq.records import FileRef, Manifest
from edgeq.system.files import sha256_file

SHAPES = Shapes(sequences=(4, 8), batches=(1, 2), threads=(1,), num_runs=3, warmup_runs=1)


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a bundle whose backend a child process knows, too."""
    where, manifest = make_bundle(tmp_path / "out")
    artifact = manifest.artifact.model_copy(update={"backend": "onnxruntime"})
    runtime: dict[str, str | int | bool] = {"intra_op_threads": 0, "graph_optimization": "all"}
    target = manifest.target.model_copy(update={"backend": "onnxruntime", "runtime": runtime})
    changed = manifest.model_copy(update={"artifact": artifact, "target": target})
    (where / "manifest.json").write_text(changed.model_dump_json(), encoding="utf-8")
    return where


@pytest.fixture
def float_model(tmp_path: Path) -> Path:
    make_model(tmp_path / "float.onnx", seed=1)
    return tmp_path / "float.onnx"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Let jobs run nowhere: the bundle takes 2 ms, FP32 takes 6 ms."""
    jobs: list[Job] = []

    def run(job: Job) -> Sample:
        jobs.append(job)
        return Sample(latencies_ms=(2.0 if Path(job.model).is_dir() else 6.0,) * 3, peak_memory_bytes=1000)

    monkeypatch.setattr(benchmark, "in_process", run)
    return jobs


def test_every_cell_runs_in_a_process_of_its_own_beside_float32(path: Path, float_model: Path) -> None:
    shapes = SHAPES.model_copy(update={"sequences": (8,), "batches": (1,)})
    found = benchmark.measure(path, shapes, float_model, silent)
    assert [cell.model for cell in found.cells] == ["artifact", "float32"]
    artifact, reference = found.cells
    assert artifact.latency is not None and reference.latency is not None
    assert 0 < artifact.latency.p50_ms <= artifact.latency.p90_ms <= artifact.latency.p99_ms
    assert artifact.speedup == pytest.approx(reference.latency.p50_ms / artifact.latency.p50_ms)
    assert reference.speedup is None
    assert artifact.peak_memory_bytes > 10_000_000
    assert found.float_bytes == float_model.stat().st_size


def test_the_grid_is_every_shape_with_both_models(path: Path, float_model: Path, in_process: list[Job]) -> None:
    steps: list[tuple[int, int]] = []
    found = benchmark.measure(path, SHAPES, float_model, lambda stage, done, total: steps.append((done, total)))
    assert [(cell.batch, cell.sequence, cell.model) for cell in found.cells] == [
        (batch, sequence, model) for batch in (1, 2) for sequence in (4, 8) for model in ("artifact", "float32")
    ]
    assert [cell.speedup for cell in found.cells] == [3.0, None] * 4
    assert {job.vocabulary for job in in_process} == {len(set(WORDS)) + 2}
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_latency_off_the_device_is_not_shown(
    path: Path, float_model: Path, in_process: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.system.host.run_kind", lambda runs_on: "host-kernels")
    found = benchmark.measure(path, SHAPES, float_model, silent)
    assert found.ran_on == "host-kernels"
    assert all(cell.latency is None and cell.speedup is None for cell in found.cells)
    assert all(cell.peak_memory_bytes == 1000 for cell in found.cells)


def test_without_float32_there_is_no_speedup(path: Path, in_process: list[Job]) -> None:
    found = benchmark.measure(path, SHAPES, None, silent)
    assert {cell.model for cell in found.cells} == {"artifact"}
    assert all(cell.speedup is None and cell.latency is not None for cell in found.cells)


def test_what_the_model_cannot_take_is_refused(path: Path, in_process: list[Job]) -> None:
    shapes = SHAPES.model_copy(update={"sequences": (4, MAX_SEQUENCE + 1)})
    with pytest.raises(ConfigError, match=str(MAX_SEQUENCE)):
        benchmark.measure(path, shapes, None, silent)
    with pytest.raises(ConfigError, match="no such file"):
        benchmark.measure(path, SHAPES, path / "nothing.onnx", silent)
    assert in_process == []


def test_percentiles_are_measured_runs() -> None:
    found = benchmark.percentiles(tuple(float(run) for run in range(1, 101)))
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (51.0, 91.0, 100.0)


def test_a_child_s_error_keeps_its_kind(path: Path, float_model: Path) -> None:
    float_model.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"float\.onnx"):
        benchmark.measure(path, SHAPES, float_model, silent)


def test_a_child_that_dies_is_a_defect_with_its_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.CompletedProcess([], -11, stdout="", stderr="segmentation fault")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *args, **kwargs: dead)
    with pytest.raises(errors.EdgeqError, match="segmentation fault") as caught:
        benchmark.measure(path, SHAPES, None, silent)
    assert caught.value.exit_code == 1


def test_a_child_that_hangs_times_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("edgeq", 1.0)

    monkeypatch.setattr(benchmark.subprocess, "run", hang)
    with pytest.raises(errors.TimedOut, match="--num_runs"):
        benchmark.measure(path, SHAPES, None, silent)


def test_peak_memory_is_this_process_s_own() -> None:
    """A child of a large process must not report its parent's peak, as getrusage does."""
    code = (
        "import subprocess, sys; block = b'x' * 400_000_000\n"
        "child = 'from edgeq.bundle.benchmark_child import peak_memory_bytes; print(peak_memory_bytes())'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 10_000_000 < int(found) < 300_000_000


def test_the_float_model_is_found_by_its_content(
    tmp_path: Path, float_model: Path, make_manifest: Callable[[Path], Manifest]
) -> None:
    from edgeq.bundle.float_model import float_model as find

    manifest = make_manifest(float_model)
    store = tmp_path / "cache" / "float-model" / ("a" * 64)
    with pytest.raises(ConfigError, match="--against"):
        find(manifest, None, tmp_path / "cache")
    store.mkdir(parents=True)
    shutil.copyfile(float_model, store / "model.onnx")
    make_model(store / "another.onnx", seed=2)
    assert find(manifest, None, tmp_path / "cache") == store / "model.onnx"
    assert find(manifest, float_model, tmp_path) == float_model
    with pytest.raises(ConfigError, match="is not the float model"):
        find(manifest, store / "another.onnx", tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        find(manifest, tmp_path / "missing.onnx", tmp_path)


@pytest.fixture
def make_manifest(path: Path) -> Callable[[Path], Manifest]:
    def make(file: Path) -> Manifest:
        ref = FileRef(path=file.name, sha256=sha256_file(file), size_bytes=file.stat().st_size)
        manifest = load_manifest(path)
        return manifest.model_copy(update={"float_model": manifest.float_model.model_copy(update={"file": ref})})

    return make


def test_validation_and_evaluation_compare_with_float32(path: Path, tmp_path: Path, float_model: Path) -> None:
    from edgeq.pipeline import validate

    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": " ".join(WORDS[i : i + 1 + i % 5])}) for i in range(14)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    same = validate.validate(path, texts, None, path / "onnx" / "model.onnx", silent)
    assert same.status == "passed", same.failures
    assert same.measures is not None and same.measures.cosine_min > 0.999999
    other = validate.validate(path, texts, None, float_model, silent)
    assert other.status == "failed"
    assert any("cosine min" in sentence for sentence in other.failures)
    reference, artifact = validate.embedders(path, float_model)
    assert reference(["how do"], None).shape == (1, DIM)
    assert not np.allclose(reference(["how do"], None), artifact(["how do"], None))


def test_a_wrong_job_exits_with_the_error_s_code(tmp_path: Path) -> None:
    job = Job(model=str(tmp_path), threads=1, batch=1, sequence=2, vocabulary=5, num_runs=1, warmup_runs=0)
    command = [sys.executable, "-m", "edgeq.bundle.benchmark_child", job.model_dump_json()]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "is no bundle" in found.stderr
    assert found.stdout == ""
