"""Build .rknn files and run them in Rockchip's simulator, in a child process that `edgeq.system.child_server` serves.

Its environment lacks edgeq: it may import the standard library, numpy, rknn-toolkit2 and the child server only.
`edgeq.system.worker` sends the requests, one JSON object per line, with packed arrays:

    {"do": "build", "model", "platform", "feeds", "integer", "output", "log"}   -> {}
    {"do": "run_many", "model", "inputs": [arrays]}     -> {"output": array}; one run for each item of the leading axis

`model` is the path of a float ONNX file; "run_many" runs what "build" built of that path. `feeds` is a list of arrays
for each calibration text, or null where nothing is quantised, and `integer` names the weight MatMuls that become int8;
all else becomes FP16. Before each step in which the compiler may die, the child writes an {"announce": ...}. The
compiler's output goes to the file `log`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.system.child_server import Actions, Announce, pack, serve_standard_streams, unpack

# Operators that stay int8 behind an int8 one: an activation after a MatMul, a Reshape after a lookup.
_FOLLOWERS = {"product": ("exGelu", "Relu", "Sigmoid", "Tanh"), "lookup": ("Reshape",)}

_LINE_BUFFERED = 1  # glibc's _IOLBF


class _Child:
    """Answer requests; keep the compilers of built files, which alone can simulate them."""

    def __init__(self, announce: Announce) -> None:
        """Announce steps with `announce`."""
        self._announce = announce
        self._built: dict[str, Any] = {}

    def actions(self) -> Actions:
        """Give the function for each value of "do"."""
        return {"build": _flushed(self._build), "run_many": _flushed(self._run_many)}

    def _build(
        self,
        model: str,
        platform: str,
        feeds: list[list[dict[str, Any]]] | None,
        integer: list[str],
        output: str,
        log: str,
    ) -> dict[str, Any]:
        with Path(log).open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        name, folder = Path(model).name, Path(f"{output}.work")  # after a death the parent process removes it
        folder.mkdir()
        os.chdir(folder)  # the compiler writes files into the working folder, and more when it fails
        self._announce(f"reading {name}")
        compiler = _compiler(platform)
        _require(compiler.load_onnx(model=model), "load_onnx")
        if feeds is None:
            self._announce(f"compiling {name}")
            _require(compiler.build(do_quantization=False), "build")
        else:
            compiler = self._quantised(compiler, folder, name, platform, feeds, set(integer))
        _require(compiler.export_rknn(output), "export_rknn")
        os.chdir("/")
        shutil.rmtree(folder)
        self._announce(f"starting the simulator for {name}")
        _require(compiler.init_runtime(), "init_runtime")
        self._built[model] = compiler
        return {}

    def _quantised(
        self, first: Any, folder: Path, name: str, platform: str, feeds: list[list[dict[str, Any]]], integer: set[str]
    ) -> Any:
        """Calibrate and compile in the toolkit's two steps, and between them set which operators stay FP16."""
        self._announce(f"calibrating {name}")
        _require(first.hybrid_quantization_step1(dataset=_write_feeds(feeds, folder)), "step 1")
        first.release()
        stem = folder / Path(name).stem
        graph, data, settings = (f"{stem}.{ending}" for ending in ("model", "data", "quantization.cfg"))
        _keep_float(Path(graph), Path(settings), integer)
        self._announce(f"compiling {name}")
        second = _compiler(platform)
        _require(second.hybrid_quantization_step2(graph, data, settings), "step 2")
        return second

    def _run_many(self, model: str, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        arrays = [unpack(packed) for packed in inputs]
        outputs = []
        for row in range(len(arrays[0])):
            self._announce(f"running {Path(model).name} in the simulator ({row + 1} of {len(arrays[0])})")
            outputs.append(self._built[model].inference(inputs=[array[row] for array in arrays])[0])
        return {"output": pack(np.stack(outputs).astype(np.float32))}


def _flushed(action: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Write out what C has buffered after an action: who gets the reply may read the log next."""

    def run(**request: Any) -> dict[str, Any]:
        try:
            return action(**request)
        finally:
            ctypes.CDLL(None).fflush(None)

    return run


def _compiler(platform: str) -> Any:
    from rknn.api import RKNN

    compiler = RKNN(verbose=True)
    options = {"quantized_dtype": "w8a8", "quantized_algorithm": "normal", "quantized_method": "channel"}
    _require(compiler.config(target_platform=platform, **options), "config")
    return compiler


def _keep_float(model: Path, settings: Path, integer: set[str]) -> None:
    """Set every operator to FP16 but weight MatMuls, their activations and embedding lookups, which stay int8.

    The compiler's name of a MatMul is ours with a suffix: `name#2`.
    """
    import onnx
    from ruamel.yaml import YAML

    graph = onnx.load(model, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    integer_values: dict[str, str] = {}
    for node in graph.node:
        read = [name for name in node.input if name and name not in stored]
        origin = integer_values.get(read[0], "") if len(read) == 1 else ""
        if node.name.split("#")[0] in integer:
            origin = "product"
        elif node.op_type == "Gather" and node.input[0] in stored:
            origin = "lookup"
        elif node.op_type not in _FOLLOWERS.get(origin, ()):
            continue
        integer_values.update(dict.fromkeys(node.output, origin))
    content = YAML(typ="safe").load(settings.read_text(encoding="utf-8"))
    known = content["quantize_parameters"]
    made = [name for node in graph.node for name in node.output]
    content["custom_quantize_layers"] = {
        name: "float16" for name in made if name in known and name not in integer_values
    }
    with settings.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)


def _require(status: int, step: str) -> None:
    if status != 0:
        raise RuntimeError(f"{step} gave {status}")


def _write_feeds(feeds: list[list[dict[str, Any]]], folder: Path) -> str:
    """Write calibration feeds as .npy files, and the compiler's list of them with a line for each text."""
    lines = []
    for row, arrays in enumerate(feeds):
        names = [folder / f"{row}_{position}.npy" for position in range(len(arrays))]
        for path, packed in zip(names, arrays, strict=True):
            np.save(path, unpack(packed), allow_pickle=False)
        lines.append(" ".join(map(str, names)))
    path = folder / "dataset.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def main(arguments: list[str]) -> int:
    """Serve requests on standard input."""
    # The toolkit's Python and C write to one log. C fills a block first, which would end in the middle of a line.
    library = ctypes.CDLL(None)
    library.setvbuf(ctypes.c_void_p.in_dll(library, "stdout"), None, _LINE_BUFFERED, 0)
    serve_standard_streams(lambda announce: _Child(announce).actions())
    return 0
