"""Measure what validating a bundle on a device costs: the device script, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark.figures import Blank, Figures
from benchmark.making import Made
from benchmark.processes import last_line
from edgeq.bundle.device_script import device_script


def validation(made: Made) -> Figures:
    """Run the device script on a bundle in a process of its own: seconds from start to end, and its peak memory."""
    if made.path is None:
        return dict.fromkeys(("texts", "seconds", "peak_mb"), Blank(made.reason))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        begin = time.perf_counter()
        command = [sys.executable, str(device_script()), str(made.path), "--report", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            blank = Blank(f"exit code {done.returncode}: {last_line(done.stderr)}")
            return {"texts": blank, "seconds": blank, "peak_mb": blank}
        found = json.loads(report.read_text(encoding="utf-8"))
    return {"texts": found["measures"]["texts"], "seconds": seconds, "peak_mb": found["peak_memory_bytes"] / 1e6}
