"""A small share of the fuzz run; `tools/fuzz` alone is the whole of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from edgeq.errors import BundleCorrupt

pytestmark = pytest.mark.release

TOOL = Path(__file__).resolve().parent.parent / "tools" / "fuzz"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loader = SourceFileLoader("fuzz_tool", str(TOOL))
    spec = spec_from_loader("fuzz_tool", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fuzz_tool", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loader.exec_module(module)
    return module


def test_broken_files_are_refused_without_a_traceback() -> None:
    done = subprocess.run([sys.executable, TOOL, "--inputs", "1000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1,000 inputs, 0 findings"


def test_what_is_no_error_of_edgeq_and_what_hangs_is_found(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = fuzz.Sandbox.make(tmp_path)
    strategy, _, _ = fuzz.kinds(box)["device report"]

    def refuse(sandbox: object, content: bytes) -> None:
        raise BundleCorrupt("no")

    def crash(sandbox: object, content: bytes) -> None:
        raise KeyError("a defect")

    def hang(sandbox: object, content: bytes) -> None:
        time.sleep(30)

    assert fuzz.run("x", strategy, refuse, box, 5, 1, None).findings == []
    (found,) = fuzz.run("x", strategy, crash, box, 5, 1, tmp_path / "keep").findings
    assert "KeyError" in found
    assert (tmp_path / "keep" / "x-0").is_file()
    monkeypatch.setattr(fuzz, "LONGEST_S", 1)
    before = signal.signal(signal.SIGALRM, fuzz.ring)
    try:
        (found,) = fuzz.run("x", strategy, hang, box, 1, 1, None).findings
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "Hang" in found


def test_a_file_outside_is_found(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = fuzz.Sandbox.make(tmp_path)

    def escape(archive: Path, place: Path) -> None:
        (place.parent / "escaped").write_text("x", encoding="utf-8")

    monkeypatch.setattr(fuzz, "unpack", escape)
    with pytest.raises(AssertionError, match="written outside"):
        fuzz.feed_archive(box, b"")
