"""Define what a place is: where the device script runs on a bundle, and brings back its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeq.devices.report import DeviceReport, PlaceKind
from edgeq.system.progress import Progress, silent

DEFAULT_TIME_LIMIT_S = 900.0


@dataclass(frozen=True)
class Job:
    """Say what is to be validated and how.

    Attributes:
        bundle: OUT/TARGET, as `edgeq export` wrote it; it is not changed.
        runs: timed runs of each length; only a device is timed.
        warmup: runs before them.
        threads: 0 leaves it to the target.
        time_limit_s: for all of it, sending included.
        progress: called as `progress(stage, done, total)`.
    """

    bundle: Path
    runs: int = 50
    warmup: int = 5
    threads: int = 0
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    progress: Progress = silent

    def options(self, kind: PlaceKind) -> list[str]:
        """Give the device script's options."""
        numbers = {"--runs": self.runs, "--warmup": self.warmup, "--threads": self.threads}
        return [word for name, value in numbers.items() for word in (name, str(value))] + ["--place", kind]


class Phone(Protocol):
    """Run commands on a phone and move files between it and this machine.

    Attributes:
        name: for messages.
        root: the folder of the phone that holds all that is sent.
    """

    name: str
    root: str

    def shell(self, words: Sequence[str], what: str) -> str:
        """Run a command and give what it wrote."""
        ...

    def script(self, text: str, what: str) -> str:
        """Run a line of shell whose words are quoted already."""
        ...

    def push(self, local: Path, remote: str) -> None:
        """Copy a file to the phone."""
        ...

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file from the phone."""
        ...


class Place(Protocol):
    """Hold a bundle, run the device script on it, give back the report; keep nothing that a run leaves but sent files.

    Attributes:
        name: tells places apart, and names their reports.
        kind: how the place is reached.
    """

    name: str
    kind: PlaceKind

    def validate(self, job: Job) -> DeviceReport:
        """Run the golden inputs of a bundle there; a report that missed the gate is returned, not raised.

        Raises:
            BundleCorrupt: the bundle is damaged, here or there, or the report is no honest one.
            ToolMissing: a program here, or Python or the runtime there, is missing; the message says how to get it.
            Unsupported: that machine is not what the bundle is for.
            LoweringFailed: the runtime there refuses the artifact, or dies of it.
            StorageFailed: a disk, here or there, is full or read-only.
            DeviceUnavailable: the place cannot be reached, or went away.
            TimedOut: it took longer than the job allows.
        """
        ...
