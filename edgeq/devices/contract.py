"""Define a transport: how a bundle reaches a machine, how the device script runs there, how its report comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeq.devices.report import DeviceReport, TransportKind
from edgeq.system.progress import Progress, silent

DEFAULT_TIME_LIMIT_S = 900.0


@dataclass(frozen=True)
class Job:
    """Hold which bundle the device script validates, how often it runs, and within which time.

    Attributes:
        bundle: OUT/TARGET, as `edgeq export` wrote it; it is not changed.
        runs: timed runs of each length; only the target's own device is timed.
        warmup: untimed runs before them.
        threads: of the runtime; 0 takes the number in the target's settings.
        time_limit_s: for the whole validation, sending files included.
        progress: called as `progress(stage, done, total)`.
    """

    bundle: Path
    runs: int = 50
    warmup: int = 5
    threads: int = 0
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    progress: Progress = silent

    def options(self, kind: TransportKind) -> list[str]:
        """Give the command-line options for the device script.

        Args:
            kind: of the transport; the report repeats it.
        """
        numbers = {"--runs": self.runs, "--warmup": self.warmup, "--threads": self.threads}
        return [word for name, value in numbers.items() for word in (name, str(value))] + ["--transport", kind]


class Phone(Protocol):
    """Run shell commands on a phone, and copy files to and from it.

    Attributes:
        name: of the phone, for messages.
        root: the folder on the phone below which every sent file lies.
    """

    name: str
    root: str

    def shell(self, words: Sequence[str], what: str) -> str:
        """Run a command on the phone, each word quoted, and give its stdout."""
        ...

    def script(self, text: str, what: str) -> str:
        """Run one line of shell, whose words the caller has quoted, and give its stdout."""
        ...

    def push(self, local: Path, remote: str) -> None:
        """Copy a file to the phone."""
        ...

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file from the phone."""
        ...


class Transport(Protocol):
    """Send a bundle to a machine, run the device script there, and bring the report back; leave only the sent files.

    Attributes:
        name: of the machine with its address; part of the report's file name.
        kind: how the machine is reached.
    """

    name: str
    kind: TransportKind

    def validate(self, job: Job) -> DeviceReport:
        """Run the golden inputs of a bundle on the machine; a report that missed the gate is returned, not raised.

        Raises:
            BundleCorrupt: the bundle is damaged, here or there, or the report contradicts the bundle or itself.
            ToolMissing: a program here, or Python or the runtime there, is missing; the message says how to get it.
            Unsupported: that machine is not what the bundle is for.
            LoweringFailed: the runtime there refuses the artifact, or dies of it.
            StorageFailed: a disk, here or there, is full or read-only.
            DeviceUnavailable: the machine cannot be reached, or the connection was lost.
            TimedOut: it took longer than the job allows.
        """
        ...
