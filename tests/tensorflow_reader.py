"""TensorFlow as the second reader of .tflite files, in an environment of its own that is made once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_integer import Meant, is_added

from edgeq.backends import tflite
from edgeq.backends.tflite import child
from edgeq.errors import ToolMissing
from edgeq.system.environments import Environment, interpreter
from edgeq.system.worker import Worker, child_command

TESTS = Path(__file__).resolve().parent
_PINS = (TESTS.parent / "tools" / "constraints-tensorflow.txt").read_text(encoding="utf-8").splitlines()
TENSORFLOW = Environment(
    "tensorflow", tuple(line for line in _PINS if not line.startswith("#")), ("3.11", "3.12", "3.13")
)


def python() -> Path:
    """Give the Python that has TensorFlow; a test that cannot have one is skipped, and says why."""
    try:
        return interpreter(TENSORFLOW)
    except ToolMissing as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Tensor:
    """One tensor as a schema's reader gives it."""

    graph: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int


@dataclass(frozen=True)
class Reading:
    """What TensorFlow finds in a file: its tensors, and each signature's operators in order."""

    version: str
    tensors: tuple[Tensor, ...]
    operators: dict[str, list[str]]
    analysis: str


def read(path: Path) -> Reading:
    """Let TensorFlow's schema and analyser read a file."""
    command = [python(), "-I", TESTS / "tensorflow_child.py", path]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    lists = ("shape", "scale", "zero_point")
    tensors = tuple(Tensor(**{**item, **{key: tuple(item[key]) for key in lists}}) for item in found["tensors"])
    return Reading(found["version"], tensors, _operators(found["analysis"]), found["analysis"])


def _operators(analysis: str) -> dict[str, list[str]]:
    """Read the analyser's text: `Subgraph#0 seq_16(T#0, T#1) -> [T#9]`, and below it `Op#0 GATHER(T#2, T#0) -> ...`."""
    found: dict[str, list[str]] = {}
    for match in re.finditer(r"^(?:Subgraph#\d+ (\w+)\(|  Op#\d+ (\w+)\()", analysis, re.MULTILINE):
        if match[1]:
            found[match[1]] = []
        else:
            found[list(found)[-1]].append(match[2])
    return found


def session(path: Path, runtime: str, buckets: Sequence[int]) -> tflite.TfliteSession:
    """Load a file into one of `child.RUNTIMES`, TensorFlow's in its own environment."""
    its_python = python() if runtime.startswith("tensorflow") else Path(sys.executable)
    worker = Worker(child_command(its_python, child.__file__, runtime), runtime)
    worker.call(do="load", path=str(path), threads=1)
    return tflite.TfliteSession(worker, tuple(buckets), tflite.output_params(path))


def compared(tensors: Sequence[Tensor], wanted: Mapping[str, Meant]) -> dict[str, bool]:
    """Say of every tensor with codes whether they are what the QDQ model means, and of the rest whether it is integer.

    Returns:
        "seq_16: layer.0.gelu" and whether dtype, scales, zero points and their axis are right.
    """
    found = {}
    for tensor in tensors:
        is_right = tensor.dtype in ("int8", "int16", "int32", "int64") and len(tensor.scale) == len(tensor.zero_point)
        if tensor.scale and not is_added(tensor.name):
            dtype, scale, zero_point = wanted[tensor.name]
            is_right &= tensor.dtype == dtype
            is_right &= tensor.scale == tuple(scale.tolist())
            is_right &= tensor.zero_point == tuple(np.asarray(zero_point, np.int64).tolist())
            is_right &= len(tensor.scale) in (1, tensor.shape[tensor.axis])
        found[f"{tensor.graph}: {tensor.name}"] = is_right
    return found
