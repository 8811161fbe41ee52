from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import DIM, MAX_SEQUENCE, WORDS, TinyBackend, make_bundle, make_model

from edgeq import errors
from edgeq.analysis import scheme_search
from edgeq.backends.registry import BACKENDS
from edgeq.bundle import benchmark, benchmark_child, turns
from edgeq.bundle.benchmark import Shapes
from edgeq.bundle.benchmark_child import Job
from edgeq.bundle.manifest import load_manifest
from edgeq.bundle.turns import Ratio, TimedChild
from edgeq.errors import ConfigError
from edgeq.records import FileRef, Manifest
from edgeq.system.files import sha256_file

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPES = Shapes(sequences=(4, 8), batches=(1, 2), threads=(1,), rounds=16, warmup_rounds=2)


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a bundle whose backend a child process knows, too."""
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
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
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Let jobs run nowhere: the bundle takes 2 ms, FP32 takes 6 ms."""
    jobs: list[Job] = []

    class Child(AbstractContextManager[object]):
        def __init__(self, job: Job) -> None:
            jobs.append(job)
            self._run_ms = 2.0 if Path(job.model).is_dir() else 6.0

        def __call__(self, runs: int, untimed: int) -> list[float]:
            return [self._run_ms] * runs

        def peak_memory_bytes(self) -> int:
            return 1000

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(turns, "TimedChild", Child)
    return jobs


def test_every_cell_runs_in_a_process_of_its_own_beside_float32(path: Path, float_model: Path) -> None:
    shapes = SHAPES.model_copy(update={"sequences": (8,), "batches": (1,)})
    found = benchmark.measure(path, shapes, float_model, silent)
    assert [cell.model for cell in found.cells] == ["artifact", "float32"]
    artifact, reference = found.cells
    assert artifact.latency is not None and reference.latency is not None
    assert 0 < artifact.latency.p50_ms <= artifact.latency.p90_ms <= artifact.latency.p99_ms
    assert artifact.speedup is not None and artifact.speedup.low is not None and artifact.speedup.high is not None
    assert (artifact.speedup.against, artifact.speedup.pairs, artifact.speedup.level) == ("float32", 8, 0.99)
    assert 0 < artifact.speedup.low <= artifact.speedup.median <= artifact.speedup.high
    assert reference.speedup is None
    assert artifact.peak_memory_bytes > 10_000_000
    assert found.float_bytes == float_model.stat().st_size


def test_the_grid_is_every_shape_with_both_models(path: Path, float_model: Path, jobs: list[Job]) -> None:
    steps: list[tuple[int, int]] = []
    found = benchmark.measure(path, SHAPES, float_model, lambda stage, done, total: steps.append((done, total)))
    assert [(cell.batch, cell.sequence, cell.model) for cell in found.cells] == [
        (batch, sequence, model) for batch in (1, 2) for sequence in (4, 8) for model in ("artifact", "float32")
    ]
    ratio = Ratio(against="float32", pairs=8, median=3.0, low=3.0, high=3.0, level=0.99, verdict="faster")
    assert [cell.speedup for cell in found.cells] == [ratio, None] * 4
    assert ratio.shown() == "3.00x [3.00, 3.00] faster"
    assert {job.vocabulary for job in jobs} == {len(set(WORDS)) + 2}
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_latency_off_the_device_is_not_shown(
    path: Path, float_model: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.system.host.run_kind", lambda runs_on: "host-kernels")
    found = benchmark.measure(path, SHAPES, float_model, silent)
    assert found.ran_on == "host-kernels"
    assert all(cell.latency is None and cell.speedup is None for cell in found.cells)
    assert all(cell.peak_memory_bytes == 1000 for cell in found.cells)


def test_without_float32_there_is_no_speedup(path: Path, jobs: list[Job]) -> None:
    found = benchmark.measure(path, SHAPES, None, silent)
    assert {cell.model for cell in found.cells} == {"artifact"}
    assert all(cell.speedup is None and cell.latency is not None for cell in found.cells)


def test_what_the_model_cannot_take_is_refused(path: Path, jobs: list[Job]) -> None:
    shapes = SHAPES.model_copy(update={"sequences": (4, MAX_SEQUENCE + 1)})
    with pytest.raises(ConfigError, match=str(MAX_SEQUENCE)):
        benchmark.measure(path, shapes, None, silent)
    with pytest.raises(ConfigError, match="no such file"):
        benchmark.measure(path, SHAPES, path / "nothing.onnx", silent)
    assert jobs == []


def test_percentiles_are_measured_runs() -> None:
    found = turns.percentiles(tuple(float(run) for run in range(1, 101)))
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (51.0, 91.0, 100.0)


def test_a_child_s_error_keeps_its_kind(path: Path, float_model: Path) -> None:
    float_model.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"float\.onnx"):
        benchmark.measure(path, SHAPES, float_model, silent)


@pytest.fixture
def child(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TimedChild]:
    monkeypatch.setattr(turns, "_CALL_LIMIT_S", 10.0)
    job = Job(model=str(float_model), threads=1, batch=1, sequence=4, vocabulary=5)
    with TimedChild(job) as made:
        yield made


def test_a_child_stays_and_says_why_it_cannot_run(child: TimedChild) -> None:
    assert len(child(3, 1)) == 3 and min(child(2, 0)) > 0
    assert child.peak_memory_bytes() > 10_000_000
    with pytest.raises(errors.LoweringFailed, match=r"float\.onnx, batch 1 x 4 tokens: .*integer"):
        child("many", 0)  # type: ignore[arg-type]
    assert len(child(1, 0)) == 1


def test_a_child_that_dies_is_told_with_what_to_do(child: TimedChild) -> None:
    process = child._worker._process
    process.kill()
    process.wait()
    with pytest.raises(errors.ChildDied, match=r"float\.onnx.*died of SIGKILL") as caught:
        child(1, 0)
    assert "If memory ran out: smaller batches" in str(caught.value)


def test_a_child_that_hangs_is_ended(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(model=str(float_model), threads=1, batch=1, sequence=4, vocabulary=5)
    with TimedChild(job) as child:
        monkeypatch.setattr(child._worker, "_time_limit_s", 0.2)
        child._worker._process.send_signal(signal.SIGSTOP)
        with pytest.raises(errors.TimedOut, match=r"float\.onnx.*within 0\.2 s"):
            child(1, 0)
        assert child._worker._process.poll() is not None


def test_memory_that_runs_out_is_told_with_what_to_do(float_model: Path) -> None:
    job = Job(model=str(float_model), threads=1, batch=10**12, sequence=4, vocabulary=5)
    with pytest.raises(errors.LoweringFailed, match="memory ran out .*smaller batches"), TimedChild(job):
        pass


@pytest.mark.parametrize("said", ["std::bad_alloc", "Failed to allocate memory for requested buffer of size 9"])
def test_a_runtime_without_memory_is_known_by_its_words(said: str) -> None:
    def run() -> dict[str, object]:
        raise RuntimeError(said)

    assert "memory ran out" in benchmark_child._told(run)()["failed"]
    with pytest.raises(RuntimeError, match="another"):
        benchmark_child._told(lambda: (_ for _ in ()).throw(RuntimeError("another")))()


def test_ctrl_c_leaves_no_process(float_model: Path) -> None:
    program = (
        "import signal\nfrom edgeq.bundle import turns\nfrom edgeq.bundle.benchmark_child import Job\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits that it is ignored
        f"job = Job(model={str(float_model)!r}, threads=1, batch=1, sequence=4, vocabulary=5)\n"
        "told = set()\n"
        "class Told(turns.TimedChild):\n"
        "    def __call__(self, runs, untimed):\n"
        "        if (pid := self._worker._process.pid) not in told:\n"
        "            told.add(pid)\n"
        "            print(pid, flush=True)\n"
        "        return super().__call__(runs, untimed)\n"
        "turns.TimedChild = Told\n"
        "turns.timed_by_turns({'a': job, 'b': job}, 10**9, 0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        children = {int(parent.stdout.readline()) for _ in range(2)}
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(30) == -signal.SIGINT
    assert len(children) == 2 and not any(Path(f"/proc/{number}").exists() for number in children)


def test_without_one_that_fails_the_others_go_on(float_model: Path, tmp_path: Path) -> None:
    job = Job(model=str(float_model), threads=1, batch=1, sequence=4, vocabulary=5)
    models = {"gone": job.model_copy(update={"model": str(tmp_path)}), "here": job}
    timed, failed = turns.timed_by_turns(models, 2, 0, goes_on=True)
    assert set(timed) == {"here"} and len(timed["here"].turns.rounds_ms) == 2
    assert isinstance(failed["gone"], ConfigError) and "is no bundle" in str(failed["gone"])
    with pytest.raises(ConfigError, match="is no bundle"):
        turns.timed_by_turns(models, 2, 0)


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
    phrases = dict.fromkeys(" ".join(WORDS[(i * k) % 16] for k in range(1, 2 + i % 7)) + f" {i}" for i in range(300))
    lines = [json.dumps({"text": phrase}) for phrase in phrases]
    texts.write_text("\n".join(lines), encoding="utf-8")
    same = validate.validate(path, texts, None, path / "onnx" / "model.onnx", silent)
    assert same.status == "passed", same.failures
    assert same.measures is not None and same.measures.cosine_min > 0.999999
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines[:14]), encoding="utf-8")
    undecided = validate.validate(path, few, None, path / "onnx" / "model.onnx", silent)
    assert undecided.failures == ("measured on 14; at least 256 are needed: undecided: about 242 more.",)
    other = validate.validate(path, texts, None, float_model, silent)
    assert other.status == "failed"
    assert any("cosine min" in sentence for sentence in other.failures)
    reference, artifact = validate.embedders(path, float_model)
    assert reference(["how do"], None).shape == (1, DIM)
    assert not np.allclose(reference(["how do"], None), artifact(["how do"], None))


def test_the_demo_s_table_says_what_a_speed_up_tells(
    path: Path, float_model: Path, jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("demo_table", REPOSITORY / "tools" / "demo_table.py")
    assert spec is not None and spec.loader is not None
    demo_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo_table)
    shapes = SHAPES.model_copy(update={"sequences": (8,), "batches": (1,)})
    found = benchmark.measure(path, shapes, float_model, silent)
    made = {"target": "tiny", "size_bytes": 5, "parity": None, "ran_on": "device", "status": "passed", "path": "p"}
    (tmp_path / "export.json").write_text(json.dumps({"bundles": [made]}), encoding="utf-8")
    (tmp_path / "tiny.bench.json").write_text(found.model_dump_json(), encoding="utf-8")
    assert "3.00x [3.00, 3.00] faster" in demo_table.row(made, found.model_dump(mode="json"))
    demo_table.main(tmp_path)
    assert "3.00x" in capsys.readouterr().out


def test_what_promoting_a_product_costs_is_measured_by_turns(
    path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = scheme_search._Trials(None, path, silent)  # type: ignore[arg-type]
    slower = path.parent / "slower.onnx"
    slower.write_bytes(b"")
    monkeypatch.setattr(trials, "run", lambda names: (None, slower if names else path))
    found, reason = trials.extra_milliseconds(["a product"])
    assert found is not None and reason is None and len(jobs) == 2
    assert (found.low, found.median, found.high, found.size) == (4.0, 4.0, 4.0, scheme_search.TIMED_ROUNDS // 2)
    monkeypatch.setattr(scheme_search, "run_kind", lambda runs_on: "host-kernels")
    assert trials.extra_milliseconds(["a product"]) == (None, "it runs here on host-kernels, not on the device")
