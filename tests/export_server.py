"""Import torch once, export once, and fork for each export that follows: the process that starts edgeq's own child.

edgeq exports a torch model in a process of its own, `python -m ...torch.convert REQUEST`, which spends most of its time
on importing torch, transformers and what torch's exporter needs. `forked` puts a fork of one such process in its place.
The fork runs the same module with the same arguments, folder, environment and output; tests/test_export_server.py shows
that it writes the same bytes. A fork that hangs is killed, and a process of its own exports then.

    python tests/export_server.py     answers requests on standard input, a line of JSON each, until it ends
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

MODULE = "edgeq.frontend.torch.convert"
LONGEST_S = 240.0  # of one export, of a few seconds: a fork may wait for a lock that a thread of its parent held
HUNG = -signal.SIGKILL


class Server:
    """Start the process that forks with the first request, and end it with `close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # tests export from several threads
        self._log: IO[bytes] | None = None

    def call(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run `python -m MODULE ARGUMENT...` as a fork, and give its exit code and what it wrote."""
        with self._lock, tempfile.TemporaryDirectory() as folder:
            if self._process is None:
                command = [sys.executable, __file__]
                self._log = tempfile.TemporaryFile()
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
                )
            request = {"arguments": list(arguments), "cwd": str(Path.cwd()), "env": dict(os.environ), "folder": folder}
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            if not answer:
                assert self._log is not None
                self._log.seek(0)
                raise RuntimeError(f"{__file__} ended: {self._log.read()[-3000:].decode(errors='replace')}")
            texts = [(Path(folder) / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(["python", "-m", *arguments], int(answer), *texts)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
        if self._log is not None:
            self._log.close()


def forked(server: Server, below: Path, run: Callable[..., Any] = subprocess.run) -> Callable[..., Any]:
    """Give a `subprocess.run` that lets the server export models of a folder, and does all else as before."""

    def replaced(command: Any, *positional: Any, **options: Any) -> Any:
        if isinstance(command, list) and command[:2] == [sys.executable, "-m"] and command[2] == MODULE:
            directory = Path(json.loads(command[3])["located"]["directory"])
            if directory.is_relative_to(below) and set(options) <= {"capture_output", "text", "errors", "check"}:
                done = server.call(command[2:])
                if done.returncode != HUNG:
                    return done
        return run(command, *positional, **options)

    return replaced


def _warm_up() -> None:
    """Export a small model, with one thread: a process that has started others cannot be forked safely."""
    import warnings

    import tiny_source
    import torch

    from edgeq.frontend import locate
    from edgeq.frontend.torch.convert import convert

    threads, seeded = torch.get_num_threads(), torch.get_rng_state()  # the same in every new process
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        (folder / "out").mkdir()
        located = locate.locate(str(tiny_source.sentence_transformer(folder / "model")))
        convert(located, folder / "out", True)
    torch.set_num_threads(threads)
    torch.set_rng_state(seeded)


def _run(request: dict[str, Any]) -> None:
    """Be the child: never returns."""
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv[1:] = request["arguments"][1:]
        sys.modules.pop(request["arguments"][0], None)  # it becomes __main__
        try:
            runpy.run_module(request["arguments"][0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(child: int, longest_s: float = LONGEST_S) -> int:
    """Give a child's exit code; HUNG for one that took too long and was killed."""
    last = time.monotonic() + longest_s
    while time.monotonic() < last:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Warm up, and fork for each line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that torch prints is an answer
    _warm_up()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        print(_ended(child), file=answers, flush=True)


if __name__ == "__main__":
    main()
