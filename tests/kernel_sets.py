"""Every set of TFLite kernels that this machine can run: how it starts, and what it lacks or gets wrong.

A kernel is written "NAME VERSION DTYPES": the operator, its version, the dtypes of its data inputs and of its result.
What a set lacks or gets wrong is asserted, too, so a new release that mends it makes a test fail.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import tensorflow_reader
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends import tflite
from edgeq.backends.tflite import child
from edgeq.backends.tflite.kernels import Operator
from edgeq.errors import ChildDied, ToolMissing
from edgeq.system.cache import Cache
from edgeq.system.child_server import pack
from edgeq.system.environments import KIND, Environment, interpreter
from edgeq.system.files import replacing_dir
from edgeq.system.worker import Worker, child_command, unpack_reply

TESTS = Path(__file__).resolve().parent
TFLITE_MICRO = Environment(
    "tflite-micro",
    ("tflite-micro==0.dev20261023182759", "numpy==2.4.6", "flatbuffers==25.12.19", "PyYAML==6.0.4"),
    ("3.11",),
)
LITERT_JS = ("@litertjs/core@2.5.3", "@litertjs/wasm-utils@2.5.3")


@dataclass(frozen=True)
class KernelSet:
    """One build of TFLite's kernels, in a child process of its own."""

    name: str
    command: Callable[[], list[str]]
    lacks: frozenset[str] = frozenset()
    gets_wrong: frozenset[str] = frozenset()
    takes_32_bits_only: bool = False  # in and out; the operators between have all dtypes

    def __str__(self) -> str:
        return self.name

    def file(self, data: bytes) -> bytes:
        """Give the form of a file that the set takes."""
        return with_32_bit_ends(data) if self.takes_32_bits_only else data

    def started(self) -> Worker:
        """Start a child process; a test that cannot have it is skipped, and says why."""
        try:
            return Worker(self.command(), self.name, time_limit_s=120)
        except ToolMissing as error:
            pytest.skip(str(error))


class Running:
    """A kernel set in a child process, and in another one where a kernel has killed it."""

    def __init__(self, kernels: KernelSet, folder: Path) -> None:
        self.kernels = kernels
        self._folder, self._files = folder, 0
        self._worker = kernels.started()

    def run(self, data: bytes, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
        """Run a file with one signature "only" and one output; None where a kernel kills the process.

        Raises:
            LoweringFailed: the set refuses the file.
        """
        self._files += 1  # a loaded file is mapped into memory, and must not change
        path = self._folder / f"{self._files}.tflite"
        path.write_bytes(self.kernels.file(data))
        arrays = {
            name: pack(array.astype(np.int32) if self.kernels.takes_32_bits_only else array)
            for name, array in inputs.items()
        }
        try:
            self._worker.call(do="load", path=str(path), threads=1)
            reply = self._worker.call(do="run", signature="only", inputs=arrays)
        except ChildDied:
            self.close()
            self._worker = self.kernels.started()
            return None
        finally:
            path.unlink()
        (result,) = reply["outputs"].values()
        return unpack_reply(result)

    def close(self) -> None:
        self._worker.close()


def _python_child(python: Callable[[], Path], runtime: str) -> Callable[[], list[str]]:
    return lambda: child_command(python(), child.__file__, runtime)


def _own() -> Path:
    return Path(sys.executable)


def _tensorflow() -> Path:
    return interpreter(tensorflow_reader.TENSORFLOW)


def _tflite_runtime() -> Path:
    return interpreter(tflite.TFLITE_RUNTIME)


def _tflite_micro() -> list[str]:
    return child_command(interpreter(TFLITE_MICRO), TESTS / "tflite_micro_child.py")


def litert_js() -> Path:
    """Give the folder of LiteRT.js's packages, fetched once by npm.

    Raises:
        ToolMissing: there is no Node.js or npm, or npm cannot fetch them.
    """
    folder = Cache().root / KIND / ("litert-js-" + LITERT_JS[0].rpartition("@")[2])
    if (folder / "node_modules").is_dir():
        return folder / "node_modules"
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise ToolMissing("LiteRT.js needs Node.js and npm: apt-get install nodejs npm")
    with replacing_dir(folder) as partial:
        (partial / "package.json").write_text(json.dumps({"private": True}), encoding="utf-8")
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", partial, *LITERT_JS]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolMissing(f"npm cannot fetch {' '.join(LITERT_JS)}: {done.stderr.strip()[-300:]}")
    return folder / "node_modules"


def _litert_js() -> list[str]:
    packages = litert_js()
    return [str(shutil.which("node")), str(TESTS / "litert_js_child.mjs"), str(packages)]


_OLD_LACKS = frozenset(
    {
        "FULLY_CONNECTED 11 int16 int8 int32 int16",
        "FULLY_CONNECTED 11 int16 int8 int64 int16",
        "GELU 2 int16 int16",
        "QUANTIZE 1 int8 int16",
        "RSQRT 1 int16 int16",
    }
)
# It multiplies every channel by the first channel's scale.
_OLD_REFERENCE_GETS_WRONG = frozenset(
    {
        "FULLY_CONNECTED 4 int16 int8 int16",
        "FULLY_CONNECTED 5 int8 int8 int32 int8",
        "FULLY_CONNECTED 5 int8 int8 int8",
    }
)
_TENSORFLOW_LACKS = frozenset({"QUANTIZE 1 int8 int16"})
_MICRO_LACKS = frozenset(
    {
        "BATCH_MATMUL 2 int8 int8 int32",
        "EXP 2 int8 int8",
        "GATHER 2 int16 int32 int16",
        "GELU 2 int16 int16",
        "GELU 2 int8 int8",
        "REDUCE_MAX 2 int32 int32",
        "REDUCE_MAX 3 int16 int16",
        "RIGHT_SHIFT 1 int32 int32 int32",
        "SUM 1 int32 int32",
    }
)

SETS = [
    KernelSet("litert", _python_child(_own, "litert")),
    KernelSet("litert-builtin", _python_child(_own, "litert-builtin")),
    KernelSet("litert-reference", _python_child(_own, "litert-reference")),
    KernelSet("tensorflow", _python_child(_tensorflow, "tensorflow"), _TENSORFLOW_LACKS),
    KernelSet("tensorflow-builtin", _python_child(_tensorflow, "tensorflow-builtin"), _TENSORFLOW_LACKS),
    KernelSet("tensorflow-reference", _python_child(_tensorflow, "tensorflow-reference"), _TENSORFLOW_LACKS),
    KernelSet("tflite-runtime", _python_child(_tflite_runtime, "tflite-runtime"), _OLD_LACKS),
    KernelSet("tflite-runtime-builtin", _python_child(_tflite_runtime, "tflite-runtime-builtin"), _OLD_LACKS),
    KernelSet(
        "tflite-runtime-reference", _python_child(_tflite_runtime, "tflite-runtime-reference"), _OLD_LACKS,
        _OLD_REFERENCE_GETS_WRONG,
    ),
    KernelSet("tflite-micro", _tflite_micro, _MICRO_LACKS),
    KernelSet("litert-js", _litert_js, takes_32_bits_only=True),
]  # fmt: skip
BY_NAME = {each.name: each for each in SETS}


def parameters() -> list[object]:
    """Give every set as a parameter of a fixture, TensorFlow's with its mark."""
    return [
        pytest.param(each, id=each.name, marks=[pytest.mark.tensorflow] if each.name.startswith("tensorflow") else [])
        for each in SETS
    ]


def kernel(operator: Operator) -> str:
    """Give the kernel that an operator needs, as the lists above write it."""
    return " ".join([operator.name, str(operator.version), *operator.dtypes])


def packed(model: schema.ModelT) -> bytes:
    """Give the bytes of a file."""
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def unpacked(data: bytes) -> schema.ModelT:
    """Give the tables of a file."""
    return schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))


def with_32_bit_ends(data: bytes) -> bytes:
    """Let each input and output of a file that has fewer bits pass as int32, with a CAST behind it or before it."""
    model = unpacked(data)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CAST
    code.version = 1
    model.operatorCodes.append(code)
    for graph, signature in zip(model.subgraphs, model.signatureDefs, strict=True):
        for is_input, ends, ports in ((True, "inputs", signature.inputs), (False, "outputs", signature.outputs)):
            indices = [int(index) for index in getattr(graph, ends)]
            for place, index in enumerate(indices):
                inner = graph.tensors[index]
                if inner.type == schema.TensorType.INT32:
                    continue
                outer = schema.TensorT()
                outer.name, outer.shape, outer.type = inner.name + b"/int32", inner.shape, schema.TensorType.INT32
                graph.tensors.append(outer)
                indices[place] = len(graph.tensors) - 1
                operator, options = schema.OperatorT(), schema.CastOptionsT()
                first, second = (indices[place], index) if is_input else (index, indices[place])
                operator.opcodeIndex = len(model.operatorCodes) - 1
                operator.inputs, operator.outputs = np.array([first], np.int32), np.array([second], np.int32)
                options.inDataType, options.outDataType = graph.tensors[first].type, graph.tensors[second].type
                operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.CastOptions, options
                graph.operators.insert(0 if is_input else len(graph.operators), operator)
                next(port for port in ports if port.tensorIndex == index).tensorIndex = indices[place]
            setattr(graph, ends, np.array(indices, np.int32))
    return packed(model)
