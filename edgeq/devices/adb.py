"""Validate on an Android phone through `adb`: with Python there, or with LiteRT's native `benchmark_model`.

Files are stored below /data/local/tmp by sha256, so that a second run sends only changed ones. Each word of a command
for the phone's shell is quoted, because adb joins words with blanks and the shell splits them again.
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeq.devices.blobs import Blobs
from edgeq.devices.child_process import Log, follow, printable, require_report, timed_out
from edgeq.devices.contract import Job
from edgeq.devices.report import DeviceReport, TransportKind, read_report
from edgeq.errors import ConfigError, DeviceUnavailable, LoweringFailed, StorageFailed, ToolMissing
from edgeq.system.files import work_dir

_ROOT = "/data/local/tmp/edgeq-device"

_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_HASHED = re.compile(r"([0-9a-f]{64})\s+(?:.*/)?([0-9a-f]{64})")
_ATTEMPTS, _BACK_OFF_S = 3, 1.0
_COMMAND_CHARS = 3000  # an older adb takes a command of 4096 bytes
_FULL = "No space left on device"

_log = logging.getLogger(__name__)


class Adb:
    """Reach an Android phone with USB debugging on."""

    def __init__(self, where: str, python: str = "python3", native: Path | None = None, is_kept: bool = True) -> None:
        """Parse an address.

        Args:
            where: adb:SERIAL, as `adb devices` lists it.
            python: the interpreter on the phone.
            native: path of LiteRT's benchmark_model for a phone without Python.
            is_kept: leave sent files there, so that the next run sends only changed ones.

        Raises:
            ConfigError: the serial number is malformed, or there is no such binary.
        """
        self._serial = where.removeprefix("adb:")
        if not _SERIAL.fullmatch(self._serial):
            raise ConfigError(f"{where!r}: names no device; adb:SERIAL is needed, as `adb devices` lists it.")
        if native is not None and not native.is_file():
            raise ConfigError(f"--native {native}: no such file; give LiteRT's benchmark_model for the phone.")
        self._python, self._native, self._is_kept = python, native, is_kept
        self._end, self._limit_s = 0.0, 0.0
        self.root = _ROOT
        self.name = f"adb-{self._serial}"
        self.kind: TransportKind = "adb" if native is None else "adb-native"

    def validate(self, job: Job) -> DeviceReport:
        """Send missing files, run the golden inputs, and give the report; see `Transport.validate`."""
        self._limit_s, self._end = job.time_limit_s, time.monotonic() + job.time_limit_s
        blobs = Blobs.of(job.bundle)
        self._require_device()
        folder = f"{_ROOT}/runs/{uuid.uuid4().hex}"
        self.shell(["mkdir", "-p", f"{_ROOT}/store", folder], "making a folder")
        try:
            self.send(blobs.paths, job)
            if self._native is not None:
                from edgeq.devices.adb_native import validate_natively

                return validate_natively(self, self._native, blobs, folder, job)
            self._lay_out(blobs, folder)
            return self._run(folder, job)
        finally:
            self._remove(folder if self._is_kept else _ROOT)

    def shell(self, words: Sequence[str], what: str) -> str:
        """Run a command on the phone, each word quoted, and give its stdout.

        Raises:
            DeviceUnavailable: the phone was disconnected.
            StorageFailed: its storage is full.
            LoweringFailed: the command failed.
            TimedOut: the job's time limit is over.
        """
        return self.script(shlex.join(words), what)

    def script(self, text: str, what: str) -> str:
        """Run one line of shell, whose words are quoted already; errors as `shell`."""
        done = self._adb("shell", text)
        if done.returncode == 0:
            return done.stdout
        said = (done.stderr + done.stdout).strip()[-500:]
        if _FULL in said:
            raise StorageFailed(f"{self.name}: {what}: the phone's storage is full. Free some, and run again.")
        if self._is_gone(said):
            raise DeviceUnavailable(
                f"{self.name}: went away: {said}. Check the cable, and run again: it goes on from here."
            )
        raise LoweringFailed(f"{self.name}: {what} failed (status {done.returncode}): {said or 'it said nothing'}")

    def send(self, paths: Mapping[str, Path], job: Job) -> None:
        """Push the files that the phone's store lacks, by sha256.

        Raises:
            EdgeqError: the errors of `shell`.
        """
        hashing = f"cd {_ROOT}/store && for f in *; do sha256sum $f; done 2>/dev/null; true"
        listed = self.script(hashing, "listing files")
        there = {match[2] for match in map(_HASHED.fullmatch, listed.split("\n")) if match and match[1] == match[2]}
        missing = sorted(set(paths) - there)
        for done, sha256 in enumerate(missing):
            job.progress("send", done, len(missing))
            part = f"{_ROOT}/store/{sha256}.part"
            self._push(paths[sha256], part)
            self.shell(["mv", part, f"{_ROOT}/store/{sha256}"], "keeping a file")
        job.progress("send", len(missing), len(missing))

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file from the phone.

        Raises:
            DeviceUnavailable: it cannot be copied.
            TimedOut: the job's time is over.
        """
        done = self._adb("pull", remote, str(local))
        if done.returncode != 0 or not local.is_file():
            raise DeviceUnavailable(f"{self.name}: {remote} cannot be pulled: {done.stderr.strip()[-300:]}. Run again.")

    def push(self, local: Path, remote: str) -> None:
        """Copy a file to the phone."""
        self._push(local, remote)

    def _push(self, local: Path, remote: str) -> None:
        """Push a file, up to three times with growing pauses: a loose cable drops connections."""
        for attempt in range(_ATTEMPTS):
            done = self._adb("push", str(local.resolve()), remote)
            if done.returncode == 0:
                return
            said = (done.stderr + done.stdout).strip()[-300:]
            if _FULL in said:
                self._adb("shell", shlex.join(["rm", "-f", remote]))
                raise StorageFailed(f"{self.name}: the phone's storage is full. Free some, and run again.")
            _log.warning("%s: sending %s failed (%s); trying again", self.name, local.name, said)
            time.sleep(_BACK_OFF_S * 2**attempt)
        raise DeviceUnavailable(
            f"{self.name}: {local.name} cannot be sent: {said}. Check the cable; what has arrived is kept: run again."
        )

    def _require_device(self) -> None:
        """Refuse a phone that is not connected, or has not allowed this machine."""
        done = self._adb("get-state")
        state = done.stdout.strip()
        if done.returncode != 0 or state != "device":
            said = (state or done.stderr.strip()).splitlines()[-1:] or ["it said nothing"]
            raise DeviceUnavailable(
                f"{self.name}: is not there: {said[0]}. `adb devices` lists phones; turn on USB debugging and allow "
                "this machine on the screen."
            )

    def _lay_out(self, blobs: Blobs, folder: str) -> None:
        """Make the bundle's folder from the store: hard links where the file system has them, else copies."""
        lines = [shlex.join(["mkdir", "-p", path]) for path in sorted({
            f"{folder}/bundle/{name}".rpartition("/")[0] for name, _ in blobs.files})]  # fmt: skip
        names = [*((f"bundle/{name}", sha256) for name, sha256 in blobs.files), ("validate.py", blobs.script)]
        for name, sha256 in names:
            pair = shlex.join([f"{_ROOT}/store/{sha256}", f"{folder}/{name}"])
            lines.append(f"{{ ln {pair} 2>/dev/null || cp {pair}; }}")
        batch: list[str] = []
        for line in lines:
            if batch and sum(map(len, batch)) + 4 * len(batch) + len(line) > _COMMAND_CHARS:
                self.script(" && ".join(batch), "laying the bundle out")
                batch = []
            batch.append(line)
        self.script(" && ".join(batch), "laying the bundle out")

    def _run(self, folder: str, job: Job) -> DeviceReport:
        """Run the device script in the phone's Python."""
        report = f"{folder}/report.json"
        words = [
            self._python, f"{folder}/validate.py", f"{folder}/bundle", "--report", report, *job.options("adb"),
        ]  # fmt: skip
        log = Log(job.progress)
        status = follow(self._command("shell", shlex.join(words)), log, self._end - time.monotonic(), self.name)
        if status in (126, 127):
            raise ToolMissing(
                f"{self.name}: {self._python} does not run on the phone ({log.message}). Give --device-python the path "
                "of a Python there, or --native LiteRT's benchmark_model."
            )
        if self._is_gone(log.message):
            raise DeviceUnavailable(f"{self.name}: went away: {log.message}. Check the cable, and run again.")
        require_report(status, log, self.name)
        with work_dir() as here:
            self.pull(report, here / "report.json")
            return read_report(here / "report.json", job.bundle)

    def _remove(self, folder: str) -> None:
        """Remove a folder on the phone, if it is still connected."""
        try:
            subprocess.run(self._command("shell", shlex.join(["rm", "-rf", folder])), stdin=subprocess.DEVNULL,
                           capture_output=True, check=False, timeout=30.0)  # fmt: skip
        except (subprocess.TimeoutExpired, FileNotFoundError, PermissionError):
            _log.warning("%s: %s may still lie on the phone", self.name, folder)

    @staticmethod
    def _is_gone(said: str) -> bool:
        return bool(re.search(r"device ('.*' )?(not found|offline)|no devices|closed$", said))

    def _command(self, *words: str) -> list[str]:
        return ["adb", "-s", self._serial, *words]

    def _adb(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run adb and capture its output.

        Raises:
            ToolMissing: adb is not on PATH.
            TimedOut: the job's time is over.
        """
        try:
            done = subprocess.run(
                self._command(*words), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                check=False, timeout=max(0.1, self._end - time.monotonic()),
            )  # fmt: skip
        except (FileNotFoundError, PermissionError) as error:
            raise ToolMissing("adb is not on PATH; apt-get install adb, or Android's platform-tools") from error
        except subprocess.TimeoutExpired as error:
            raise timed_out(self.name, self._limit_s) from error
        done.stdout, done.stderr = printable(done.stdout), printable(done.stderr)
        return done
