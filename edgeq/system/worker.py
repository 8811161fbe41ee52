"""Run a tool in a child process and exchange lines of JSON with it.

A kernel that aborts kills its process, and some toolchains cannot share a process or an environment with edgeq. Each
line is one JSON object:

    request   {"do": "load", ...}                      edgeq to child
    announce  {"announce": "loading model.tflite"}     child to edgeq: the step it starts; any number before the reply
    reply     {...}, or {"error": "what went wrong"}   child to edgeq

An array is {"dtype": "<i4", "shape": [1, 128], "data": "..."}: base64 of its bytes, in C order. `child_server` is
the child's half.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from numpy.typing import NDArray

from edgeq.errors import ChildDied, LoweringFailed, TimedOut, ToolMissing
from edgeq.system import child_server

_TIME_LIMIT_S = 600.0
_SERVER = Path(child_server.__file__)

_LOG_LINES = 5
_LOG_BYTES = 16384
_LOG_WAIT_S = 5.0


def child_command(python: Path | str, script: Path | str, *arguments: str) -> list[str]:
    """Give the command that serves a child's file in an interpreter where edgeq need not be installed.

    Args:
        python: the interpreter; it runs isolated from the user's environment variables and folders.
        script: the child's file, which has a `main(arguments)`; see `edgeq.system.child_server`.
        arguments: for `main`.
    """
    return [str(python), "-I", str(_SERVER), str(script), *arguments]


def unpack_reply(packed: Mapping[str, Any]) -> NDArray[Any]:
    """Turn an array that a child packed into a numpy array of the same bits.

    Raises:
        LoweringFailed: it is no packed array, or its bytes do not fill its shape.
    """
    try:
        array: NDArray[Any] = child_server.unpack(packed)
    except (KeyError, TypeError, ValueError) as error:
        raise LoweringFailed(
            f"a child process gave an array that cannot be read ({error!r}); dtype, shape and base64 data that fills "
            "it are needed. Its script and edgeq do not belong together: install edgeq again."
        ) from error
    return array


class Worker:
    """Keep a child process that answers requests, one at a time; several threads must not share one.

    A call that ends without a reply (the child dies, the time limit, Ctrl-C) ends the child; a reply that is an error
    leaves it ready for the next call.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        env: Mapping[str, str] | None = None,
        time_limit_s: float = _TIME_LIMIT_S,
    ) -> None:
        """Start the child.

        Args:
            command: the interpreter, its options, the script and its arguments.
            name: of the tool in messages, e.g. "tflite-runtime 2.14.0".
            env: all environment variables of the child; None passes edgeq's own.
            time_limit_s: the longest time that one call may take.

        Raises:
            ToolMissing: the interpreter cannot be started.
        """
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
            )
        except OSError as error:
            raise ToolMissing(
                f"{name}: {command[0]} cannot be started ({error.strerror}). Run `edgeq cache purge`, so that its "
                "environment is made again, or install the interpreter."
            ) from error
        self._name = name
        self._time_limit_s = time_limit_s
        self._announced = ""
        self._log = _Log(cast(IO[bytes], self._process.stderr))
        self._end = weakref.finalize(self, _end, self._process)

    def call(self, **request: object) -> dict[str, Any]:
        """Send one request and return the child's reply.

        Raises:
            LoweringFailed: the child replies with an error, or writes a line that is no JSON object.
            ChildDied: the child ends without a reply.
            TimedOut: there is no reply within the time limit.
        """
        line = json.dumps(request).encode() + b"\n"
        if not self._end.alive:
            raise LoweringFailed(f"{self._name}: its child process has ended, and a call needs one. Start another.")
        is_late = threading.Event()
        timer = threading.Timer(self._time_limit_s, _expire, (self._process, is_late))
        timer.daemon = True
        timer.start()
        reply = None
        try:
            reply = self._exchange(line)
        finally:
            timer.cancel()
            timer.join()
            if reply is None or is_late.is_set():
                self.close()
        if is_late.is_set():
            raise TimedOut(
                f"{self._name}: no reply within {self._time_limit_s:g} s{self._situation()}.\n"
                "Give it less to do at once, or close what else keeps this machine busy."
            )
        if reply is None:
            raise ChildDied(
                f"{self._name}: the child process {fate(self._process.returncode)}{self._situation()}.\n"
                "Run the same again; if it repeats, try another version of the tool, or report the model and this text."
            )
        if "error" in reply:
            raise LoweringFailed(f"{self._name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Kill the child."""
        self._end()

    def __enter__(self) -> Self:
        """Return the worker; the end of the `with` closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kill the child."""
        self.close()

    def _exchange(self, line: bytes) -> dict[str, Any] | None:
        """Write a request and read lines up to the reply; return None if the child dies first.

        Raises:
            LoweringFailed: a line is not a JSON object.
        """
        stdin, stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        self._announced = ""
        with contextlib.suppress(BrokenPipeError):  # a child that died may have replied before
            stdin.write(line)
            stdin.flush()
        while (answer := stdout.readline()).endswith(b"\n"):
            message = self._parsed(answer)
            if "announce" not in message:
                return message
            self._announced = str(message["announce"])
        self._process.wait()
        return None

    def _parsed(self, answer: bytes) -> dict[str, Any]:
        """Parse one line from the child.

        Raises:
            LoweringFailed: it is not a JSON object.
        """
        try:
            message = json.loads(answer)
        except ValueError:
            message = None
        if isinstance(message, dict):
            return message
        self.close()
        raise LoweringFailed(
            f"{self._name}: the child process wrote {answer[:200]!r}, which is not a JSON object{self._situation()}.\n"
            "Something prints into its replies: report this text."
        )

    def _situation(self) -> str:
        """Describe what the child announced and logged last."""
        during = f" while {self._announced}" if self._announced else ""
        lines = self._log.last_lines()
        return f"{during}; its last lines:\n{lines}" if lines else f"{during}; it logged nothing"


class _Log:
    """Read a child's stderr continuously, so that its writes never block, and keep the end of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._tail = b""
        self._thread = threading.Thread(target=self._drain, args=(stream,), daemon=True)
        self._thread.start()

    def _drain(self, stream: IO[bytes]) -> None:
        with stream:
            while chunk := os.read(stream.fileno(), _LOG_BYTES):
                self._tail = (self._tail + chunk)[-_LOG_BYTES:]

    def last_lines(self) -> str:
        """Give the last lines; wait until a child that has ended has written all."""
        self._thread.join(_LOG_WAIT_S)
        return "\n".join(self._tail.decode(errors="replace").strip().splitlines()[-_LOG_LINES:])


def _expire(process: subprocess.Popen[bytes], is_late: threading.Event) -> None:
    """Kill a child that is past its time limit, which also ends a blocked write to it or read from it."""
    is_late.set()
    process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child if it lives, and close its stdin and stdout; the thread that reads stderr closes that."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # unsent bytes in the buffer
            cast(IO[bytes], stream).close()


def fate(status: int) -> str:
    """Describe the exit status of a process in words."""
    if status >= 0:
        return f"exited with status {status}"
    known = {number.value: number.name for number in signal.Signals}
    return f"died of {known.get(-status, f'signal {-status}')}"
