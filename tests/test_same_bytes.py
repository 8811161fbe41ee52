"""tools/same_bytes: a byte that differs is reported, and so is a file that is gone or new."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "same_bytes"
TARGET = "x86-64-onnxruntime"
RECORDED = {
    "files": {
        "bert/stages/float model": "a" * 64, f"bert/{TARGET}/onnx/model.onnx": "b" * 64,
        "t5/stages/float model": "c" * 64,
    },
    "refusals": {"t5/android-litert": "Unsupported: Softcap has no integer form"},
    "qdq": {"bert/w8a8-gemm": "d" * 64, "t5/w8a8-gemm": "e" * 64},
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loader = SourceFileLoader("same_bytes_tool", str(TOOL))
    spec = spec_from_loader("same_bytes_tool", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "same_bytes_tool", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(TOOL.parent.parent / "tests")])
    loader.exec_module(module)
    return module


def changed(kind: str, name: str, value: str | None) -> dict[str, dict[str, str]]:
    """Give what was recorded with one entry replaced, added or dropped."""
    copy = {each: dict(entries) for each, entries in RECORDED.items()}
    if value is None:
        del copy[kind][name]
    else:
        copy[kind][name] = value
    return copy


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        ("files", "bert/stages/float model", "f" * 64, "bert/stages/float model: aaaaaaaaaaaa -> ffffffffffff"),
        ("files", f"bert/{TARGET}/onnx/model.onnx", None, f"bert/{TARGET}/onnx/model.onnx: missing"),
        ("files", f"bert/{TARGET}/onnx/model.data", "f" * 64, f"bert/{TARGET}/onnx/model.data: new"),
        ("refusals", "t5/android-litert", None, "Softcap has no integer form -> none"),
        ("refusals", "t5/android-litert", "Unsupported: no", "Softcap has no integer form -> Unsupported: no"),
        ("refusals", "bert/android-litert", "Unsupported: no", "bert/android-litert: refusal: none -> Unsupported: no"),
    ],
)
def test_every_kind_of_difference_is_reported(
    tool: ModuleType, kind: str, name: str, value: str | None, said: str
) -> None:
    found = tool.differences(RECORDED, changed(kind, name, value))
    assert len(found.real) == 1 and said in found.real[0]
    assert found.allowed == ()


def test_the_same_has_no_differences_and_a_qdq_model_may_differ(tool: ModuleType) -> None:
    assert tool.differences(RECORDED, RECORDED) == tool.Differences((), ())
    found = tool.differences(RECORDED, changed("qdq", "bert/w8a8-gemm", "f" * 64))
    assert found == tool.Differences((), ("bert/w8a8-gemm: dddddddddddd -> ffffffffffff",))


def test_a_part_is_compared_with_what_was_recorded_of_it(tool: ModuleType) -> None:
    part = tool.within(RECORDED, {"bert": [TARGET]})
    assert set(part["files"]) == {"bert/stages/float model", f"bert/{TARGET}/onnx/model.onnx"}
    assert (part["refusals"], set(part["qdq"])) == ({}, {"bert/w8a8-gemm"})
    assert set(tool.within(RECORDED, {"t5": ["android-litert"]})["refusals"]) == {"t5/android-litert"}


def test_each_backend_and_scheme_of_the_targets_has_a_part(tool: ModuleType) -> None:
    from edgeq.targets import list_targets, load_target

    parts = [load_target(part.target) for part in tool.PARTS]
    assert {(t.backend, t.scheme) for t in list_targets()} == {(t.backend, t.scheme) for t in parts}


def test_what_does_not_repeat_is_dropped_from_messages(tool: ModuleType) -> None:
    message = "t: compiling failed\nThe log ends with:\n  12.3 ms\nAll of it lies in /place/log."
    assert tool._repeatable(message, Path("/place")) == "t: compiling failed"
    assert tool._repeatable("/place/model.onnx: no", Path("/place")) == "TEMPORARY/model.onnx: no"


@pytest.mark.export
def test_a_real_export_is_recorded_and_every_change_of_the_record_fails_the_comparison(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
    path = tmp_path / "before.json"
    command = [sys.executable, TOOL, "record", path, "--only", "bert", "--target", TARGET]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text(encoding="utf-8"))
    artifact = f"bert/{TARGET}/onnx/model.onnx"
    stages = [f"bert/stages/{name}" for name in ("calibration", "equalised model", "float model")]
    assert (sorted(content["files"]), content["refusals"]) == ([*stages, artifact], {})

    made = {kind: content[kind] for kind in tool.KINDS}
    monkeypatch.setattr(tool, "make_all", lambda plan: (made, {}))  # the same bytes again, without a second export
    options = argparse.Namespace(file=path, only=[], target=[], quick=False)
    assert tool.compare(options) == 0
    assert "0 differences" in capsys.readouterr().out

    content["files"] = made["files"] | {artifact: "0" * 64, f"bert/{TARGET}/gone": "1" * 64}
    del content["files"][stages[2]]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert tool.compare(options) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")] == [
        "DIFFERS: bert/stages/float model: new",
        f"DIFFERS: bert/{TARGET}/gone: missing",
        f"DIFFERS: {artifact}: 000000000000 -> {made['files'][artifact][:12]}",
    ]
