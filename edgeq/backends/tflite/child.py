"""Run .tflite files in one runtime, in a child process that `edgeq.system.child_server` serves.

Its environment may lack edgeq: it may import the standard library, numpy, one runtime and the child server only. Its
one argument is a key of `RUNTIMES`. `edgeq.system.worker` sends the requests, one JSON object per line, with packed
arrays:

    {"do": "version"}                                           -> {"runtime", "version", "numpy", "python"}
    {"do": "load", "path", "threads"}                           -> {"signatures": [name, ...]}; threads 0: its choice
    {"do": "run", "signature", "inputs": {name: array}}         -> {"outputs": {name: array}}
    {"do": "run_many", "signature", "inputs": {name: arrays}}   -> the same; one run per item of the leading axis
    {"do": "time", "signature", "inputs", "runs", "warmup"}     -> {"milliseconds": [one per run]}
    {"do": "memory"}                                            -> {"resident_bytes", "peak_bytes"}

A signature of null runs subgraph 0, whose inputs and outputs have their tensors' names. Before each step in which a
kernel may die, the child writes an {"announce": ...}; a Python exception becomes an {"error": ...}.
"""

from __future__ import annotations

import importlib
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.system.child_server import Actions, Announce, pack, serve_standard_streams, unpack

# runtime -> the package with the version, the module with the interpreter, the name of the operator resolver
RUNTIMES = {
    "litert": ("ai_edge_litert", "ai_edge_litert.interpreter", "AUTO"),
    "litert-builtin": ("ai_edge_litert", "ai_edge_litert.interpreter", "BUILTIN_WITHOUT_DEFAULT_DELEGATES"),
    "litert-reference": ("ai_edge_litert", "ai_edge_litert.interpreter", "BUILTIN_REF"),
    "tensorflow": ("tensorflow", "tensorflow.lite.python.interpreter", "AUTO"),
    "tensorflow-builtin": ("tensorflow", "tensorflow.lite.python.interpreter", "BUILTIN_WITHOUT_DEFAULT_DELEGATES"),
    "tensorflow-reference": ("tensorflow", "tensorflow.lite.python.interpreter", "BUILTIN_REF"),
    "tflite-runtime": ("tflite_runtime", "tflite_runtime.interpreter", "AUTO"),
    "tflite-runtime-builtin": ("tflite_runtime", "tflite_runtime.interpreter", "BUILTIN_WITHOUT_DEFAULT_DELEGATES"),
    "tflite-runtime-reference": ("tflite_runtime", "tflite_runtime.interpreter", "BUILTIN_REF"),
}

Arrays = dict[str, Any]  # name -> numpy array; numpy 1 and 2 agree on no narrower type


class _Program:
    """Run one signature of a loaded file, or subgraph 0 of one that has none."""

    def __init__(self, interpreter: Any, signature: str | None) -> None:
        """Look up the inputs; nothing runs yet."""
        self._interpreter = interpreter
        self._runner: Any = None
        if signature is None:
            self._inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
        else:
            self._runner = interpreter.get_signature_runner(signature)
            self._inputs = self._runner.get_input_details()

    def check(self, inputs: Arrays) -> None:
        """Refuse inputs of another name, dtype or shape: runtimes resize to any shape, and may die of it.

        Raises:
            ValueError: they do not fit the signature.
        """
        if inputs.keys() != self._inputs.keys():
            raise ValueError(f"inputs are {sorted(inputs)}; {sorted(self._inputs)} are needed")
        for name, array in inputs.items():
            dtype, shape = np.dtype(self._inputs[name]["dtype"]), self._inputs[name]["shape_signature"].tolist()
            fits = len(shape) == array.ndim and all(n in (-1, m) for n, m in zip(shape, array.shape, strict=True))
            if array.dtype != dtype or not fits:
                raise ValueError(f"input {name} is {array.dtype}{list(array.shape)}; {dtype}{shape} is needed")

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run once on checked inputs."""
        if self._runner is not None:
            outputs: Arrays = self._runner(**inputs)
            return outputs
        for name, array in inputs.items():
            self._interpreter.resize_tensor_input(self._inputs[name]["index"], array.shape)
        self._interpreter.allocate_tensors()
        for name, array in inputs.items():
            self._interpreter.set_tensor(self._inputs[name]["index"], array)
        self._interpreter.invoke()
        details = self._interpreter.get_output_details()
        return {detail["name"]: self._interpreter.get_tensor(detail["index"]) for detail in details}


class _Child:
    """Answer requests with one runtime and one loaded file."""

    def __init__(self, runtime: str, announce: Announce) -> None:
        """Import nothing yet, so that a runtime that cannot be imported is an error of the first request."""
        self._runtime = runtime
        self._announce = announce
        self._interpreter: Any = None
        self._path = ""
        self._programs: dict[str | None, _Program] = {}

    def actions(self) -> Actions:
        """Give the function for each value of "do"."""
        return {
            "version": self._version,
            "load": self._load,
            "run": self._run,
            "run_many": self._run_many,
            "time": self._time,
            "memory": self._memory,
        }

    def _module(self) -> Any:
        """Import the runtime's module."""
        self._announce(f"importing {RUNTIMES[self._runtime][1]}")
        return importlib.import_module(RUNTIMES[self._runtime][1])

    def _version(self) -> dict[str, Any]:
        self._module()
        version = sys.modules[RUNTIMES[self._runtime][0]].__version__
        python = platform.python_version()
        return {"runtime": self._runtime, "version": version, "numpy": np.__version__, "python": python}

    def _load(self, path: str, threads: int) -> dict[str, Any]:
        self._interpreter, self._path, self._programs = None, path, {}  # a failed load leaves no older file to run
        module = self._module()
        self._announce(f"loading {path}")
        self._interpreter = module.Interpreter(
            model_path=path,
            num_threads=threads or None,
            experimental_op_resolver_type=module.OpResolverType[RUNTIMES[self._runtime][2]],
        )
        return {"signatures": list(self._interpreter.get_signature_list())}

    def _run(self, signature: str | None, inputs: dict[str, Any]) -> dict[str, Any]:
        program, arrays = self._prepared(signature, inputs)
        (outputs,) = self._run_each(signature, program, [arrays])
        return {"outputs": {name: pack(array) for name, array in outputs.items()}}

    def _run_many(self, signature: str | None, inputs: dict[str, Any]) -> dict[str, Any]:
        program = self._program(signature)
        arrays = {name: unpack(packed) for name, packed in inputs.items()}
        counts = {len(array) for array in arrays.values() if array.ndim}
        if len(counts) != 1 or counts == {0} or not all(array.ndim for array in arrays.values()):
            raise ValueError(f"leading axes are {sorted(counts)}; one length above 0, of all inputs, is needed")
        runs = [{name: array[i] for name, array in arrays.items()} for i in range(counts.pop())]
        program.check(runs[0])
        results = self._run_each(signature, program, runs)
        return {"outputs": {name: pack(np.stack([result[name] for result in results])) for name in results[0]}}

    def _run_each(self, signature: str | None, program: _Program, runs: list[Arrays]) -> list[Arrays]:
        results = []
        for number, arrays in enumerate(runs, 1):
            self._announce(f"running {signature or 'subgraph 0'} of {self._path} ({number} of {len(runs)})")
            results.append(program(arrays))
        return results

    def _time(self, signature: str | None, inputs: dict[str, Any], runs: int, warmup: int) -> dict[str, Any]:
        program, arrays = self._prepared(signature, inputs)
        self._announce(f"timing {signature or 'subgraph 0'} of {self._path}, {runs} runs after {warmup} to warm up")
        for _ in range(warmup):
            program(arrays)
        milliseconds = []
        for _ in range(runs):
            begin = time.perf_counter_ns()
            program(arrays)
            milliseconds.append((time.perf_counter_ns() - begin) / 1e6)
        return {"milliseconds": milliseconds}

    def _memory(self) -> dict[str, Any]:
        """Read resident memory, now and at its peak. Source: Linux, Documentation/filesystems/proc.rst, table 1-2."""
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        return {"resident_bytes": sizes["VmRSS"], "peak_bytes": sizes["VmHWM"]}

    def _program(self, signature: str | None) -> _Program:
        if self._interpreter is None:
            raise ValueError("no file is loaded; a load is needed first")
        if signature not in self._programs:
            self._programs[signature] = _Program(self._interpreter, signature)
        return self._programs[signature]

    def _prepared(self, signature: str | None, inputs: dict[str, Any]) -> tuple[_Program, Arrays]:
        program = self._program(signature)
        arrays = {name: unpack(packed) for name, packed in inputs.items()}
        program.check(arrays)
        return program, arrays


def main(arguments: list[str]) -> int:
    """Serve requests on standard input with the runtime that the one argument names."""
    if len(arguments) != 1 or arguments[0] not in RUNTIMES:
        sys.stderr.write(f"arguments are {arguments}; one of {', '.join(RUNTIMES)} is needed\n")
        return 2
    serve_standard_streams(lambda announce: _Child(arguments[0], announce).actions())
    return 0
