"""Run .tflite files in TensorFlow Lite Micro's Python interpreter, in an environment where edgeq is not installed.

It answers "load" and "run" as `edgeq.backends.tflite.child` does, for files with one signature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tflite_micro.python.tflite_micro import runtime

from edgeq.system.child_server import Actions, Announce, pack, serve_standard_streams, unpack

_ARENA_BYTES = 1 << 26


class _Child:
    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._interpreter: Any = None

    def actions(self) -> Actions:
        return {"load": self._load, "run": self._run}

    def _load(self, path: str, threads: int) -> dict[str, Any]:
        self._announce(f"loading {path}")
        self._interpreter = runtime.Interpreter.from_bytes(Path(path).read_bytes(), arena_size=_ARENA_BYTES)
        return {}

    def _run(self, signature: str, inputs: dict[str, Any]) -> dict[str, Any]:
        self._announce(f"running {signature}")
        for position, packed in enumerate(inputs.values()):  # in the order of the file's inputs
            self._interpreter.set_input(unpack(packed), position)
        self._interpreter.invoke()
        return {"outputs": {"result": pack(self._interpreter.get_output(0))}}


def main(arguments: list[str]) -> int:
    serve_standard_streams(lambda announce: _Child(announce).actions())
    return 0
