"""The device script runs on an emulated 64-bit Arm in each runtime; its vectors count, its times do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_device import ort_bundle, tflite_bundle

from edgeq.devices import arm64
from edgeq.devices.contract import Job
from edgeq.devices.transports import transport_of
from edgeq.errors import ToolMissing, Unsupported
from edgeq.records import RunsOn

ARM = RunsOn(machine="aarch64", cpu_flags_all=("asimd",), cpu_flags_any=())
emulated = [
    pytest.mark.arm64,
    pytest.mark.skipif(
        not os.environ.get("EDGEQ_ARM64"),
        reason="run it with EDGEQ_ARM64=1: fetches 90 MB into .arm64/ once, and needs qemu-user-static and debootstrap",
    ),
]


@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param("onnxruntime", marks=emulated),
        pytest.param("litert", marks=[*emulated, pytest.mark.tflite]),
        pytest.param("tflite-runtime", marks=[*emulated, pytest.mark.tflite]),
    ],
)
def test_the_emulated_arm_gives_the_vectors_of_this_machine(tmp_path: Path, runtime: str) -> None:
    if runtime == "onnxruntime":
        path = ort_bundle(tmp_path / "out", runs_on=ARM)
    else:
        pytest.importorskip("ai_edge_litert", reason='pip install "edgeq[tflite]"')
        settings = {"interpreter": runtime, "threads": 1, "bias_bits": 32, "upcast": "cast", "lookup": "all"}
        path = tflite_bundle(tmp_path / "out", runs_on=ARM, runtime=settings)
    found = transport_of("arm64").validate(Job(path))
    assert (found.transport, found.ran_on, found.status) == ("arm64", "emulator", "passed")
    assert (found.machine.machine, found.machine.lacks) == ("aarch64", ())
    assert (found.cells, found.load_ms, found.peak_memory_bytes) == ((), None, None)
    assert {"onnxruntime", "ai-edge-litert", "tflite-runtime"} & set(found.tools)
    assert found.host is not None and found.host.centred_cosine_min > 0.999  # another version's kernel is a code off


def test_other_runtimes_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="needs a runtime for tiny"):
        transport_of("arm64").validate(Job(ort_bundle(tmp_path / "out", backend="tiny")))


def test_a_recipe_that_fails_or_is_missing_is_a_missing_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ort_bundle(tmp_path / "out")
    monkeypatch.setattr(arm64, "data_dir", lambda name: tmp_path)
    with pytest.raises(ToolMissing, match="Use a checkout"):
        transport_of("arm64").validate(Job(path))
    (tmp_path / "arm64").write_text("#!/bin/sh\necho 'no network here' >&2\nexit 3\n", encoding="utf-8")
    (tmp_path / "arm64").chmod(0o755)
    with pytest.raises(ToolMissing, match="arm64: no network here"):
        transport_of("arm64").validate(Job(path))
