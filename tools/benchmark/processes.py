"""Run commands and take their time and the peak memory of their process trees."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_POLL_S = 0.1
_RARELY = 30  # looking takes at most so small a share of the time: gigabytes take tens of milliseconds


@dataclass(frozen=True)
class Ran:
    """Say how a command went; a failure keeps the end of what it wrote."""

    seconds: float
    peak_gb: float
    exit_code: int
    log: str


def measured(command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run a command; memory is the peak of the proportional set size of all its processes together."""
    began = time.perf_counter()
    peak = 0
    with log.open("wb") as output:
        words = [str(word) for word in command]
        child = psutil.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
        while child.poll() is None:
            looked = time.perf_counter()
            peak = max(peak, sum(map(_memory, [child, *_children(child)])))
            with contextlib.suppress(psutil.TimeoutExpired):
                child.wait(max(_POLL_S, _RARELY * (time.perf_counter() - looked)))
    seconds = time.perf_counter() - began
    return Ran(seconds, peak / 1e9, child.returncode, log.read_text(encoding="utf-8", errors="replace"))


def last_line(log: str) -> str:
    """Give the last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def first_line(error: Exception) -> str:
    """Give what an error of edgeq's says first; what to do about it stands below."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
