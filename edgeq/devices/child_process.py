"""Run the device script as a child process: follow its progress, kill it after a time limit, and read its report."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from edgeq.devices.contract import Job
from edgeq.devices.report import DeviceReport, read_report
from edgeq.errors import EdgeqError, LoweringFailed, ParityFailed, TimedOut, ToolMissing, error_of
from edgeq.system.files import work_dir
from edgeq.system.progress import Progress

_STAGE = re.compile(r"\[validate\] ([a-z0-9 ]{1,40}) (\d{1,9})/(\d{1,9})")
_LINE_BYTES, _LOG_LINES = 4096, 40


class Log:
    """Collect the last lines of the script's stderr, and pass its progress lines to a callback."""

    def __init__(self, progress: Progress) -> None:
        """Take the callback for progress."""
        self._progress = progress
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        """Add one line of stderr."""
        line = printable(line.rstrip())
        match = _STAGE.fullmatch(line)
        if match is not None:
            self._progress(match[1], int(match[2]), int(match[3]))
        elif line:
            self.lines = [*self.lines[1 - _LOG_LINES :], line]

    @property
    def message(self) -> str:
        """Give the script's last message, or without one the last lines of stderr."""
        own = [line for line in self.lines if line.startswith("validate.py: ")]
        return own[-1].removeprefix("validate.py: ") if own else " | ".join(self.lines[-3:]) or "it said nothing"


def printable(text: str) -> str:
    """Drop control characters except line breaks: the text may come from another machine."""
    return "".join(sign for sign in text if sign.isprintable() or sign == "\n")


@dataclass
class _Watch:
    """Hold whether the time limit ended a process."""

    is_over: bool = False


@contextlib.contextmanager
def watched(process: subprocess.Popen[bytes], limit_s: float) -> Iterator[_Watch]:
    """Kill a process after a time limit, and in any case when the context ends."""
    watch = _Watch()

    def end() -> None:
        watch.is_over = True
        kill(process)

    timer = threading.Timer(max(0.0, limit_s), end)
    timer.daemon = True
    timer.start()
    try:
        yield watch
    finally:
        timer.cancel()
        kill(process)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its children."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()


def lines_of(stream: IO[bytes], take: Callable[[str], None]) -> None:
    """Read a stream to its end, line by line; lines of over 4096 bytes are cut."""
    while line := stream.readline(_LINE_BYTES):
        take(line.decode("utf-8", "replace"))


def follow(command: Sequence[str | Path], log: Log, limit_s: float, what: str) -> int:
    """Run a command that writes progress to stderr, and give its exit status.

    Raises:
        ToolMissing: there is no such program.
        TimedOut: it exceeded the time limit, and was killed.
    """
    try:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ToolMissing(f"{what}: {command[0]} is not there. Install it, and run again.") from error
    with watched(process, limit_s) as watch:
        if process.stderr is not None:
            lines_of(process.stderr, log)
        status = process.wait()
    if watch.is_over:
        raise timed_out(what, limit_s)
    return status


def timed_out(what: str, limit_s: float) -> TimedOut:
    """Make the error for a validation that exceeded its time limit."""
    return TimedOut(f"{what}: not done after {limit_s:.0f} s. Give it a longer --time-limit, or fewer --runs.")


def validate_as(command: Sequence[str | Path], job: Job, options: Sequence[str], what: str) -> DeviceReport:
    """Run the device script on this machine's file system, and read its report.

    Args:
        command: the interpreter and the script.
        job: the bundle, and how to run it.
        options: of the script.
        what: the transport's name, for messages.

    Raises:
        EdgeqError: the errors of `Transport.validate`.
    """
    begin = time.monotonic()
    log = Log(job.progress)
    with work_dir() as folder:
        found = folder / "report.json"
        words = [*command, job.bundle.resolve(), "--report", found, *options]
        status = follow(words, log, job.time_limit_s - (time.monotonic() - begin), what)
        require_report(status, log, what)
        return read_report(found, job.bundle)


def require_report(status: int, log: Log, what: str) -> None:
    """Raise the error for the exit status of a script that wrote no report.

    Raises:
        EdgeqError: the class that has this exit code; `LoweringFailed` where the script died.
    """
    if status in (0, ParityFailed.exit_code):
        return
    kind = error_of(status)
    if kind is not None and kind is not EdgeqError:
        raise kind(f"{what}: {log.message}")
    died = signal_name(status)
    raise LoweringFailed(
        f"{what}: the device script {died}: {log.message}. Try the runtime version that the bundle's manifest names."
    )


def signal_name(status: int) -> str:
    """Describe how a process ended; a shell adds 128 to the number of a signal."""
    number = -status if status < 0 else status - 128
    try:
        return f"died of {signal.Signals(number).name}"
    except ValueError:
        return f"ended with status {status}"
