"""A few of the faults; `tools/faults` alone is the whole of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.release, pytest.mark.export]

TOOL = Path(__file__).resolve().parent.parent / "tools" / "faults"


@pytest.mark.parametrize(("kind", "kills"), [("export", 2), ("release", 3), ("twice", 0)])
def test_a_fault_leaves_nothing_half_written(kind: str, kills: int) -> None:
    pytest.importorskip("torch", reason="needs the extra `export`")
    command = [sys.executable, TOOL, "--only", kind, "--kills", str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout
