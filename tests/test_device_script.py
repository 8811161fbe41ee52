"""The device script gives edgeq's own vectors and measures, misses the gate when it must, and trusts no bundle."""

from __future__ import annotations

import ast
import io
import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import TEXTS
from tiny_device import edit_manifest, load_script, ort_bundle, tflite_bundle, without_runtime

import edgeq
from edgeq.bundle.checksums import write_sums
from edgeq.bundle.device_script import device_script
from edgeq.bundle.golden import read_golden, write_arrays
from edgeq.devices.report import parse_report
from edgeq.evaluation import parity
from edgeq.records import RunsOn
from edgeq.system.host import cpu_flags, run_kind

SCRIPT = load_script()
FAST = ("--runs", "3", "--warmup", "1")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return ort_bundle(tmp_path / "out")


def run(path: Path, *options: str) -> int:
    return int(SCRIPT.main([str(path), "--report", str(path.parent / "r.json"), *FAST, *options]))


def report(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path.parent / "r.json").read_text(encoding="utf-8"))
    return found


def test_it_is_python_3_8_and_imports_the_standard_library_and_numpy_alone() -> None:
    tree = ast.parse(device_script().read_text(encoding="utf-8"), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {"numpy"}


def test_a_bundle_carries_the_same_bytes_and_they_run_without_edgeq(made: Path) -> None:
    assert (made / "validate.py").read_bytes() == device_script().read_bytes()
    assert "  validate.py\n" in (made / "SHA256SUMS").read_text(encoding="utf-8")
    command = [sys.executable, "-I", "validate.py", *FAST]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "passed, ran on device" in done.stdout and "p50" in done.stdout
    assert "[validate] run 32/32" in done.stderr
    found = parse_report((made.parent / "device-report.json").read_bytes(), "r", made)
    assert (found.status, found.ran_on, found.transport) == ("passed", "device", "by-hand")
    assert found.peak_memory_bytes is not None and found.peak_memory_bytes > 1_000_000
    assert [cell.sequence for cell in found.cells] == [12] and found.cells[0].runs == 3


def test_vectors_and_measures_are_edgeqs_own(made: Path) -> None:
    manifest = SCRIPT.Manifest(made, SCRIPT.check_sums(made, SCRIPT.Progress()))
    golden = SCRIPT.Golden(made, manifest)
    runner, _ = SCRIPT.load(manifest, 0)
    vectors, invariance = SCRIPT.run_all(golden, runner, manifest, SCRIPT.Progress())
    embedder = edgeq.load(made)
    one_by_one = np.concatenate([embedder.encode([text]) for text in TEXTS])
    assert np.array_equal(vectors, one_by_one)
    own = read_golden(made)
    expected = parity.measure(own.reference, vectors, own.texts, invariance)
    assert SCRIPT.measure(golden, vectors, invariance) == pytest.approx(expected.model_dump())
    assert 0.999999 < invariance <= 1.0


def test_places_and_flags_are_edgeqs_own(made: Path) -> None:
    assert SCRIPT.cpu_flags() == cpu_flags()
    manifest = SCRIPT.Manifest(made, SCRIPT.read_sums(made))
    for machine, flags in (("x86_64", ()), ("aarch64", ()), ("x86_64", ("avx9",))):
        manifest.machine, manifest.flags_any = machine, flags
        runs_on = RunsOn(machine=machine, cpu_flags_all=(), cpu_flags_any=flags)
        assert SCRIPT.run_kind(manifest, None, False) == run_kind(runs_on)
    assert SCRIPT.run_kind(manifest, None, True) == "emulator"


def test_nothing_is_timed_where_it_is_not_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = RunsOn(machine="another", cpu_flags_all=(), cpu_flags_any=())
    path = ort_bundle(tmp_path / "out", runs_on=elsewhere)
    assert run(path) == 0
    assert (report(path)["ran_on"], report(path)["cells"], report(path)["load_ms"]) == ("host-kernels", [], None)
    assert " ms" not in capsys.readouterr().out
    assert run(path, "--emulated") == 0
    assert (report(path)["ran_on"], report(path)["peak_memory_bytes"]) == ("emulator", None)


def test_a_report_holds_no_control_characters() -> None:
    found = SCRIPT.printable({"a\x1b": ["x\ny", ("ü\x07",), 1, None]})
    assert found == {"a ": ["x y", ["ü "], 1, None]}


def damaged(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    with np.load(path / "golden.npz") as archive:
        arrays = dict(archive)
    change(arrays)
    write_arrays(path / "golden.npz", arrays)
    write_sums(path)


def alone(arrays: dict[str, np.ndarray], reference: np.ndarray) -> None:
    """Leave FP32's vectors alone to compare with: the exporting machine ran nothing."""
    arrays["reference"] = reference
    del arrays["embeddings"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda arrays: alone(arrays, np.roll(arrays["reference"], 1, axis=0)), "centred cosine mean is"),
        (lambda arrays: alone(arrays, -arrays["reference"]), "centred cosine min is -"),
        (lambda arrays: arrays.update(reference=arrays["reference"] * 1.5), "norm error"),
        (lambda arrays: arrays.update(reference=np.full_like(arrays["reference"], np.nan)), "NaN or infinity"),
        (lambda arrays: arrays.update(reference=np.ones_like(arrays["reference"])), "one direction"),
        (lambda arrays: arrays.update(embeddings=-arrays["embeddings"]), "exactness: centred cosine"),
        (lambda arrays: arrays.update(embeddings=np.roll(arrays["embeddings"], 1, axis=0)), "exporting machine"),
    ],
    ids=["swapped rows", "flipped sign", "one wrong scale", "NaN", "constant", "flipped host", "another host"],
)
def test_wrong_vectors_miss_the_gate(
    made: Path, change: Callable[[dict[str, np.ndarray]], object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(made, change)
    assert run(made) == 6
    assert sentence in capsys.readouterr().err
    assert report(made)["status"] == "failed"


def test_a_bundle_that_was_never_run_is_compared_with_fp32_alone(made: Path) -> None:
    damaged(made, lambda arrays: arrays.pop("embeddings"))
    assert run(made) == 0
    assert report(made)["host"] is None


def test_a_missing_runtime_is_named_with_its_command_after_the_sums_were_checked(made: Path, tmp_path: Path) -> None:
    command = [*without_runtime(tmp_path), str(device_script()), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "-m pip install onnxruntime" in done.stderr
    with (made / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"x")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7 and "onnx/model.onnx: its sha256" in done.stderr


def test_a_cpu_without_the_flags_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = RunsOn(machine=SCRIPT.machine(), cpu_flags_all=("avx9",), cpu_flags_any=())
    assert run(ort_bundle(tmp_path / "out", runs_on=own)) == 4
    assert "the CPU lacks avx9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "runtime", "exit_code", "words"),
    [("ethos_u", {}, 4, "bare-metal"), ("rockchip", {"platform": "rk3588"}, 3, "rknn-toolkit-lite2")],
)
def test_what_cannot_run_here_is_said(
    tmp_path: Path, backend: str, runtime: dict[str, str], exit_code: int, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(ort_bundle(tmp_path / "out", backend=backend, runtime=runtime)) == exit_code
    assert words in capsys.readouterr().err


def test_a_file_that_the_runtime_refuses_is_one_message(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "onnx" / "model.onnx").write_bytes(b"no model")
    write_sums(made)
    sums = SCRIPT.read_sums(made)
    edit_manifest(made, lambda manifest: manifest["artifact"]["files"][0].update(sha256=sums["onnx/model.onnx"]))
    assert run(made) == 5
    assert "the runtime refuses the artifact" in capsys.readouterr().err


def test_the_report_never_goes_into_the_bundle(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPT.main([str(made), "--report", str(made / "r.json")]) == 2
    assert "must stay as it is" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_a_message_about_the_disk(made: Path) -> None:
    assert SCRIPT.main([str(made), "--report", str(made.parent / "none" / "r.json"), *FAST]) == 8


# --- what a hostile bundle may hold ---


def npz(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path / "golden.npz", "w") as archive:
        archive.writestr(f"{name}.npy", content)
    write_sums(path)


def pickled(path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([{"a": 1}], object), version=(1, 0), allow_pickle=True)
    npz(path, "reference", buffer.getvalue())


def enormous(path: Path) -> None:
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 16)}
    np.lib.format.write_array_header_1_0(buffer, header)
    npz(path, "reference", buffer.getvalue() + bytes(64))


def outside(path: Path) -> None:
    with (path / "SHA256SUMS").open("a", encoding="utf-8") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n")


def linked(path: Path) -> None:
    (path / "linked").symlink_to("/etc/passwd")


def deep(path: Path) -> None:
    (path / "manifest.json").write_text('{"target": ' + "[" * 200_000 + "]" * 200_000 + "}", encoding="utf-8")
    write_sums(path)


def not_a_number(path: Path) -> None:
    text = (path / "manifest.json").read_text(encoding="utf-8")
    (path / "manifest.json").write_text(text.replace('"exactness_min": 0.99', '"exactness_min": NaN', 1))
    write_sums(path)


def another_artifact(path: Path) -> None:
    edit_manifest(path, lambda manifest: manifest["artifact"]["files"][0].update(path="../../../etc/passwd"))


def many_tokens(path: Path) -> None:
    damaged(path, lambda arrays: arrays.update(
        input_ids=np.zeros((32, 5000), np.int64), attention_mask=np.ones((32, 5000), np.int64)))  # fmt: skip


HOSTILE = [pickled, enormous, outside, linked, deep, not_a_number, another_artifact, many_tokens]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_hostile_bundles_are_refused_in_one_line(
    made: Path, change: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    change(made)
    assert run(made) == 7
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[validate]")]
    assert len(told) == 1 and told[0].startswith("validate.py: ")


# --- other runtimes ---


@pytest.mark.tflite
def test_litert_gives_edgeqs_vectors_in_buckets(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason='pip install "edgeq[tflite]"')
    path = tflite_bundle(tmp_path / "out")
    assert run(path) == 0
    found = report(path)
    assert found["host"]["max_abs_error"] == 0.0 and found["measures"]["centred_cosine_mean"] < 0.99999
    assert [cell["sequence"] for cell in found["cells"]] == [16, 32]


@pytest.mark.openvino
def test_openvino_gives_edgeqs_vectors(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason='pip install "edgeq[openvino]"')
    path = ort_bundle(tmp_path / "out", backend="openvino", runtime={
        "device": "CPU", "inference_precision_hint": "f32", "also_inference_precision_hint": "bf16",
        "dynamic_quantization_group_size": 0, "inference_num_threads": 1, "num_streams": 1,
        "performance_hint": "LATENCY"})  # fmt: skip
    (path / "openvino").mkdir()
    openvino.save_model(
        openvino.convert_model(path / "onnx" / "model.onnx"), path / "openvino" / "openvino_model.xml",
        compress_to_fp16=False,
    )  # fmt: skip
    write_sums(path)
    names = ("openvino/openvino_model.xml", "openvino/openvino_model.bin")
    sums = SCRIPT.read_sums(path)
    files = [{"path": name, "sha256": sums[name], "size_bytes": 1} for name in names]
    edit_manifest(path, lambda manifest: manifest["artifact"].update(files=files))
    assert run(path) == 0
    assert report(path)["host"]["max_abs_error"] < 1e-6


def test_two_bundles_take_turns(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ort_bundle(tmp_path / "other", name="other")
    assert run(made, "--beside", str(other), "--runs", "16") == 0
    found = parse_report((made.parent / "r.json").read_bytes(), "r", made)
    assert found.beside is not None and found.beside.target == "other"
    (cell,) = found.beside.cells
    assert (cell.sequence, cell.pairs, cell.level) == (12, 8, 0.99)
    assert cell.low is not None and cell.high is not None and 0 < cell.low <= cell.median <= cell.high
    assert f"12 tokens, beside other: {cell.median:.2f}x [{cell.low:.2f}, {cell.high:.2f}] {cell.verdict}" in (
        capsys.readouterr().out
    )


def test_another_bundle_that_cannot_be_timed_is_told(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = RunsOn(machine="another", cpu_flags_all=(), cpu_flags_any=())
    stranger = ort_bundle(tmp_path / "stranger", runs_on=elsewhere)
    assert run(made, "--beside", str(stranger)) == SCRIPT.UNSUPPORTED
    assert "runs here on host-kernels, whose times mean nothing" in capfd.readouterr().err
    assert run(stranger, "--beside", str(made)) == SCRIPT.UNSUPPORTED
    other = ort_bundle(tmp_path / "damaged")
    (other / "tokenizer.json").write_bytes(b"{}")
    assert run(made, "--beside", str(other)) == SCRIPT.CORRUPT
    assert "its process ended while it was timed (status 7)" in capfd.readouterr().err
    assert run(made, "--beside", str(tmp_path)) == SCRIPT.CONFIG


def test_a_bundle_that_hangs_is_ended(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = SCRIPT.Served(made, 1)
    try:
        assert len(served.turn(12, 3, 1)) == 3
        monkeypatch.setattr(SCRIPT, "TURN_LIMIT_S", 0.2)
        served._process.send_signal(signal.SIGSTOP)
        with pytest.raises(SCRIPT.Stop, match="signal 9; memory may have run out, or 0.2 s"):
            served.turn(12, 1, 0)
    finally:
        served.close()
