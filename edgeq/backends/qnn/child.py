"""Compile context binaries and run them in QAIRT's emulator, in a child process: `python -m edgeq.backends.qnn.child`.

`edgeq.system.worker` sends the requests, one JSON object per line:

    {"do": "compile", "model", "context", "options", "log"}   -> {"partitions": [{"provider", "nodes": [[op, name]]}]}
    {"do": "describe", "path"}                                -> what `context_info` gives
    {"do": "load", "contexts": {length: path}}                -> {}
    {"do": "run_many", "length", "inputs": {name: arrays}}    -> {"output": array}; one run per item of the leading axis

Before each step in which the compiler or the emulator may die, the child writes an {"announce": ...}. Their output
while compiling goes to the file `log`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn

from edgeq.backends.qnn.context_info import context_info
from edgeq.system.child_server import Actions, Announce, pack, serve_standard_streams, unpack

_PROVIDER = "QNNExecutionProvider"
_WARNINGS, _ERRORS = 2, 3  # ONNX Runtime's log levels


class _Child:
    """Answer requests; keep the sessions of loaded context binaries."""

    def __init__(self, announce: Announce) -> None:
        """Register the execution provider; on a PC its device is a CPU, on which the emulator runs."""
        ort.register_execution_provider_library(_PROVIDER, qnn.get_library_path())
        self._devices = [device for device in ort.get_ep_devices() if device.ep_name == _PROVIDER][:1]
        self._announce = announce
        self._sessions: dict[int, ort.InferenceSession] = {}

    def actions(self) -> Actions:
        """Give the function for each value of "do"."""
        return {
            "compile": self._compile,
            "describe": self._describe,
            "load": self._load,
            "run_many": self._run_many,
        }

    def _compile(self, model: str, context: str, options: dict[str, str], log: str) -> dict[str, Any]:
        self._announce(f"compiling {Path(context).name}")
        settings = {
            "session.record_ep_graph_assignment_info": "1",
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": context,
        }
        with Path(log).open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # As bytes: a path would become part of the graph's name, and make equal binaries differ.
        session = self._session(Path(model).read_bytes(), options, settings, _WARNINGS)
        partitions = session.get_provider_graph_assignment_info()
        return {
            "partitions": [
                {"provider": part.ep_name, "nodes": [[node.op_type, node.name] for node in part.get_nodes()]}
                for part in partitions
            ]
        }

    def _describe(self, path: str) -> dict[str, Any]:
        self._announce(f"reading {Path(path).name}")
        return context_info(Path(qnn.LIB_DIR_FULL_PATH) / "libQnnSystem.so", Path(path))

    def _load(self, contexts: dict[str, str]) -> dict[str, Any]:
        self._sessions = {}
        for length, path in contexts.items():
            self._announce(f"loading {Path(path).name}")
            self._sessions[int(length)] = self._session(path, {}, {}, _ERRORS)
        return {}

    def _run_many(self, length: int, inputs: dict[str, Any]) -> dict[str, Any]:
        session = self._sessions[length]
        arrays = {name: unpack(packed) for name, packed in inputs.items()}
        count, outputs = len(next(iter(arrays.values()))), []
        for row in range(count):
            self._announce(f"running {length} tokens in the emulator ({row + 1} of {count})")
            outputs.append(session.run(None, {name: array[row] for name, array in arrays.items()})[0])
        return {"output": pack(np.stack(outputs))}

    def _session(
        self, model: str | bytes, options: dict[str, str], settings: dict[str, str], level: int
    ) -> ort.InferenceSession:
        """Load a model on the provider alone; a node that falls back to the CPU is an error."""
        session_options = ort.SessionOptions()
        session_options.log_severity_level = level
        for name, value in {"session.disable_cpu_ep_fallback": "1", **settings}.items():
            session_options.add_session_config_entry(name, value)
        session_options.add_provider_for_devices(self._devices, {"backend_path": qnn.get_qnn_htp_path(), **options})
        return ort.InferenceSession(model, sess_options=session_options)


if __name__ == "__main__":
    serve_standard_streams(lambda announce: _Child(announce).actions())
