"""Validate on another machine through the system's OpenSSH client, with the user's keys, configuration, known hosts.

A validation uses one connection to an agent that runs in the machine's Python (`tools/device/agent.py`): it lists the
files that it lacks, receives them, runs the device script and sends the report back. The remote shell sees one command.
The only part of it that a user chooses is the path of the Python, whose characters are restricted.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import subprocess
import threading
import time
import zlib
from collections.abc import Mapping
from typing import IO, Any

from edgeq.bundle.device_script import device_agent
from edgeq.devices.blobs import Blobs
from edgeq.devices.child_process import Log, kill, printable, require_report, timed_out, watched
from edgeq.devices.contract import Job
from edgeq.devices.report import LARGEST_BYTES, DeviceReport, TransportKind, parse_report
from edgeq.errors import BundleCorrupt, ConfigError, DeviceUnavailable, EdgeqError, StorageFailed, ToolMissing
from edgeq.system.files import storage_errors

_DEFAULT_PORT, _DEFAULT_ROOT, DEFAULT_PYTHON = 22, "~/.cache", "python3"

_WHERE = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?P<root>/.+)?"
)
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./~:\\+][A-Za-z0-9_./~:\\+-]*")
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
_ATTEMPTS, _BACK_OFF_S, _LAST_WORDS_S = 4, 1.0, 20.0
_PIECE, _LINE_BYTES, _GREETING_BYTES = 1 << 16, 2 * LARGEST_BYTES, 1 << 16
_NO_CONNECTION = 255  # Source: OpenSSH, ssh(1), EXIT STATUS

_log = logging.getLogger(__name__)


class _Dropped(Exception):
    """Report a connection that ended before the report arrived."""


class Ssh:
    """Reach a machine with an SSH server, Python 3.8 or newer, numpy and the bundle's runtime."""

    kind: TransportKind = "ssh"

    def __init__(self, where: str, python: str = DEFAULT_PYTHON, is_kept: bool = True) -> None:
        """Parse an address.

        Args:
            where: ssh://[user@]host[:port][/folder]; files are sent to this folder, by default to ~/.cache.
            python: the interpreter there that has the runtime, e.g. of a virtual environment.
            is_kept: leave sent files there, so that the next run sends only changed ones.

        Raises:
            ConfigError: the address is malformed, or the path holds characters that a shell would interpret.
        """
        match = _WHERE.fullmatch(where)
        if match is None or not 0 < int(match["port"] or _DEFAULT_PORT) < 65536:
            raise ConfigError(f"{where!r}: is no address; ssh://user@host, ssh://user@host:port or …/folder is needed.")
        if not _PLAIN_PATH.fullmatch(python):
            raise ConfigError(
                f"--device-python {python!r}: holds what a shell reads; letters, digits and . _ / ~ : + - are taken. "
                "Make a link to it."
            )
        host = match["host"].strip("[]")
        self._address = f"{match['user']}@{host}" if match["user"] else host
        self._port, self._root = match["port"], match["root"] or _DEFAULT_ROOT
        self._python, self._is_kept = python, is_kept
        self.name = f"ssh-{self._address}-{self._port or _DEFAULT_PORT}"

    def validate(self, job: Job) -> DeviceReport:
        """Send missing files, run the device script, and give its report; see `Transport.validate`.

        A dropped connection is repeated up to three times; files that arrived stay there.
        """
        end, blobs = time.monotonic() + job.time_limit_s, Blobs.of(job.bundle)
        for attempt in range(_ATTEMPTS):
            try:
                return self._once(job, blobs, end)
            except (_Dropped, DeviceUnavailable) as error:
                if attempt == 0 and isinstance(error, DeviceUnavailable):
                    raise  # it was never reached
                pause = _BACK_OFF_S * 2**attempt
                if attempt + 1 == _ATTEMPTS or time.monotonic() + pause > end:
                    break
                _log.warning("%s: the connection dropped (%s); making it again", self.name, error)
                time.sleep(pause)
        if time.monotonic() > end:
            raise timed_out(self.name, job.time_limit_s)
        raise DeviceUnavailable(
            f"{self.name}: the connection dropped {_ATTEMPTS} times. What has arrived is kept there: run again."
        )

    def command(self) -> list[str]:
        """Give the command line of the ssh client, with the agent's code as an argument."""
        packed = base64.b64encode(zlib.compress(device_agent().read_bytes(), 9)).decode("ascii")
        remote = f"{self._python} -c \"import base64,zlib;exec(zlib.decompress(base64.b64decode('{packed}')))\""
        options = [word for option in _OPTIONS for word in ("-o", option)]
        port = ["-p", self._port] if self._port else []
        return ["ssh", "-T", *options, *port, "--", self._address, remote]

    def _once(self, job: Job, blobs: Blobs, end: float) -> DeviceReport:
        """Validate over one connection.

        Raises:
            _Dropped: it ended before the report arrived.
        """
        try:
            pipe = subprocess.PIPE
            client = subprocess.Popen(self.command(), stdin=pipe, stdout=pipe, stderr=pipe)
        except (FileNotFoundError, PermissionError) as error:
            raise ToolMissing(
                "ssh is not on PATH, and ssh:// goes through OpenSSH's client; apt-get install openssh-client"
            ) from error
        said: list[bytes] = []
        with watched(client, end - time.monotonic()) as watch:
            listener = threading.Thread(target=_listen, args=(client.stderr, said), daemon=True)
            listener.start()
            try:
                return _Talk(client, self.name).report(job, blobs, self._request(job, blobs))
            except (_Dropped, _NotThere) as error:
                status = _ended(client)
                listener.join(5.0)
                if watch.is_over:
                    raise timed_out(self.name, job.time_limit_s) from None
                if isinstance(error, _Dropped):
                    raise
                raise self._explained(status, b"".join(said).decode("utf-8", "replace"), str(error)) from None

    def _request(self, job: Job, blobs: Blobs) -> dict[str, Any]:
        return {
            "root": self._root, "keep": self._is_kept, "script": blobs.script, "files": list(blobs.files),
            "blobs": list(blobs.sizes.items()), "options": job.options(self.kind),
        }  # fmt: skip

    def _explained(self, status: int, said: str, greeting: str) -> EdgeqError:
        """Make the error for a client that ended before the agent answered."""
        lines = [line.strip() for line in said.splitlines()[-3:] if line.strip()]
        last = printable(" | ".join(lines) or greeting) or "it said nothing"
        if status != _NO_CONNECTION:
            return ToolMissing(
                f"{self.name}: {self._python} did not run there (status {status}: {last}). Install Python 3.8 or newer "
                "with numpy and the bundle's runtime there, and name it with --device-python if it is not on PATH."
            )
        if "host key" in said.lower() or "REMOTE HOST IDENTIFICATION" in said:
            hint = f"Check its fingerprint, and connect once by hand: ssh {self._address}"
        elif "permission denied" in said.lower():
            hint = "Add your public key there (ssh-copy-id), or load it with ssh-add: no password is asked for"
        else:
            hint = "Check the address, the network and the SSH server there"
        return DeviceUnavailable(f"{self.name}: cannot be reached: {last}. {hint}.")


class _NotThere(Exception):
    """Report that no agent answered; the message is the output received instead."""


def _ended(client: subprocess.Popen[bytes]) -> int:
    """Wait for a client to end, kill it after a while, and give its status."""
    try:
        return client.wait(_LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        kill(client)
        return client.wait()


def _listen(stream: IO[bytes] | None, said: list[bytes]) -> None:
    """Collect the last 20 lines of the client's stderr."""
    while stream is not None and (line := stream.readline(_PIECE)):
        said[:] = [*said[-19:], line]


class _Talk:
    """Exchange messages and files with the agent over a client's pipes."""

    def __init__(self, client: subprocess.Popen[bytes], name: str) -> None:
        """Take a running client."""
        if client.stdin is None or client.stdout is None:
            raise EdgeqError("ssh was started without pipes. This is a defect of edgeq; please report it.")
        self._to, self._from, self._name = client.stdin, client.stdout, name

    def report(self, job: Job, blobs: Blobs, request: Mapping[str, Any]) -> DeviceReport:
        """Send the request and the missing files, follow the script, and give the report."""
        try:
            self._send(json.dumps(request).encode("ascii") + b"\n")
            self._flush()
        except _Dropped as error:
            raise _NotThere("") from error
        wants = self._wants(blobs)
        total, done = sum(blobs.sizes[sha256] - held for sha256, held in wants), 0
        for sha256, held in wants:
            with storage_errors(f"reading {blobs.paths[sha256]}"), blobs.paths[sha256].open("rb") as file:
                file.seek(held)
                while piece := file.read(_PIECE):
                    self._send(piece)
                    done += len(piece)
                    job.progress("send", done, total)
        self._flush()
        log = Log(job.progress)
        while True:
            message = self._message()
            if "line" in message:
                log(str(message["line"])[:_PIECE])
            elif "exit" in message:
                return self._finished(message, log, job)
            else:
                raise self._refused(message)

    def _wants(self, blobs: Blobs) -> list[tuple[str, int]]:
        """Read which files the agent lacks, with the bytes it has of each; output of login scripts is skipped."""
        greeting = b""
        while len(greeting) < _GREETING_BYTES:
            line = self._from.readline(_LINE_BYTES)
            if not line:
                break
            if line.startswith(b'{"error"'):
                raise self._refused(_parsed(line))
            if line.startswith(b'{"agent"'):
                wants = [(str(sha256), int(held)) for sha256, held in _parsed(line)["wants"]]
                if all(sha256 in blobs.sizes and 0 <= held <= blobs.sizes[sha256] for sha256, held in wants):
                    return wants
            greeting += line
        raise _NotThere(greeting.decode("utf-8", "replace").strip()[-200:])

    def _finished(self, message: Mapping[str, Any], log: Log, job: Job) -> DeviceReport:
        require_report(int(message["exit"]), log, self._name)
        if not isinstance(message["report"], str):
            raise BundleCorrupt(f"{self._name}: the device script ended well and left no report. Validate again.")
        return parse_report(message["report"].encode("utf-8"), self._name, job.bundle)

    def _refused(self, message: Mapping[str, Any]) -> Exception:
        """Make the error for an error message of the agent."""
        kind, text = str(message.get("error")), printable(str(message.get("message"))[:500])
        if kind == "dropped":
            return _Dropped(text)
        if kind == "storage":
            return StorageFailed(f"{self._name}: the disk there refuses: {text}. Free some space there, and run again.")
        if kind == "python":
            return ToolMissing(f"{self._name}: {text}. Install it there, and name it with --device-python.")
        if kind == "busy":
            return DeviceUnavailable(f"{self._name}: {text}.")
        return BundleCorrupt(f"{self._name}: {text}. Fetch or export the bundle again.")

    def _message(self) -> dict[str, Any]:
        line = self._from.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise _Dropped("it ended early")
        return _parsed(line)

    def _send(self, content: bytes) -> None:
        try:
            self._to.write(content)
        except OSError as error:
            self._give_up(error)

    def _flush(self) -> None:
        try:
            self._to.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Raise the agent's last error message, or `_Dropped`, after a failed write."""
        line = self._from.readline(_LINE_BYTES)
        if line.startswith(b'{"error"'):
            raise self._refused(_parsed(line)) from error
        raise _Dropped(str(error)) from error


def _parsed(line: bytes) -> dict[str, Any]:
    """Parse one JSON message of the agent; anything else counts as a broken connection."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Dropped("it said what is no JSON") from error
    if not isinstance(found, dict):
        raise _Dropped("it said what is no message")
    return found
