"""Build .rknn files and run them in Rockchip's simulator: `python child.py`, spoken to by `edgeq.system.worker`.

A script, not a module: it runs in an environment where edgeq is not installed, and imports the standard library, numpy
and rknn-toolkit2 only. Requests, one JSON object per line, arrays as `edgeq.system.worker` packs them:

    {"do": "build", "model", "platform", "feeds", "integer", "output", "log"}   -> {}
    {"do": "run_many", "model", "inputs": [arrays]}     -> {"output": array}; one run for each item of the leading axis

`model` is the path of a float ONNX file; its build stays, to be run by the same name. `feeds` is a list of arrays for
each calibration text, or null where nothing is quantised, and `integer` names the weight products that get 8 bits;
everything else gets 16 in floating point. Before each thing the compiler may die of stands an {"announce": ...}. All
that it says goes to the file `log`.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

Announce = Callable[[str], None]

# What keeps the 8 bits of the operator before it: an activation is part of its product, a lookup is only shaped anew.
# The names are the compiler's (it writes exGelu), and edgeq.graph.operators is not installed where this file runs.
_FOLLOWERS = {"product": ("exGelu", "Relu", "Sigmoid", "Tanh"), "lookup": ("Reshape",)}


def pack(array: Any) -> dict[str, Any]:
    """Turn an array into what JSON can carry."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def unpack(packed: Mapping[str, Any]) -> Any:
    """Turn what `pack` made back into an array."""
    return np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])


_LINE_BUFFERED = 1  # glibc's _IOLBF


class Child:
    """Answer requests about .rknn files."""

    def __init__(self, announce: Announce) -> None:
        """Take what announces."""
        self._announce = announce
        self._built: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {"build": self._build, "run_many": self._run_many}
        do = request.pop("do", None)
        if do not in actions:
            raise ValueError(f"do is {do!r}; one of {', '.join(actions)} is needed")
        return actions[do](**request)

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
        name, folder = Path(model).name, Path(f"{output}.work")  # who asked clears away what a death leaves of it
        folder.mkdir()
        os.chdir(folder)  # the compiler writes where it stands, and more of it when it fails
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
        """Calibrate and compile in the toolkit's two steps, between which everybody may say what stays float."""
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


def _compiler(platform: str) -> Any:
    from rknn.api import RKNN

    compiler = RKNN(verbose=True)
    options = {"quantized_dtype": "w8a8", "quantized_algorithm": "normal", "quantized_method": "channel"}
    _require(compiler.config(target_platform=platform, **options), "config")
    return compiler


def _keep_float(model: Path, settings: Path, integer: set[str]) -> None:
    """Let 8 bits be where the weight products, their activations and the embedding tables are, and nowhere else.

    The compiler has named its products after ours: `name#2`.
    """
    import onnx
    from ruamel.yaml import YAML

    graph = onnx.load(model, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    coded: dict[str, str] = {}
    for node in graph.node:
        read = [name for name in node.input if name and name not in stored]
        origin = coded.get(read[0], "") if len(read) == 1 else ""
        if node.name.split("#")[0] in integer:
            origin = "product"
        elif node.op_type == "Gather" and node.input[0] in stored:
            origin = "lookup"
        elif node.op_type not in _FOLLOWERS.get(origin, ()):
            continue
        coded.update(dict.fromkeys(node.output, origin))
    content = YAML(typ="safe").load(settings.read_text(encoding="utf-8"))
    known = content["quantize_parameters"]
    made = [name for node in graph.node for name in node.output]
    content["custom_quantize_layers"] = {name: "float16" for name in made if name in known and name not in coded}
    with settings.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)


def _require(status: int, step: str) -> None:
    if status != 0:
        raise RuntimeError(f"{step} gave {status}")


def _write_feeds(feeds: list[list[dict[str, Any]]], folder: Path) -> str:
    """Write the calibration feeds as the compiler wants them: a list of files with a line for each text."""
    lines = []
    for row, arrays in enumerate(feeds):
        names = [folder / f"{row}_{position}.npy" for position in range(len(arrays))]
        for path, packed in zip(names, arrays, strict=True):
            np.save(path, unpack(packed), allow_pickle=False)
        lines.append(" ".join(map(str, names)))
    path = folder / "dataset.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def serve(requests: Iterable[bytes], replies: IO[str]) -> None:
    """Answer every request until there are no more."""

    def put(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    child = Child(lambda what: put({"announce": what}))
    for line in requests:
        try:
            reply = child.answer(json.loads(line))
        except (Exception, SystemExit) as error:  # the one boundary: the toolkit may raise anything, or exit
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        ctypes.CDLL(None).fflush(None)  # who gets the reply may read the log next
        put(reply)


def main() -> int:
    """Keep stdout for replies alone: what the libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        # The toolkit's Python and C write to one log. C fills a block first, which would end in the middle of a line.
        library = ctypes.CDLL(None)
        library.setvbuf(ctypes.c_void_p.in_dll(library, "stdout"), None, _LINE_BUFFERED, 0)
        serve(sys.stdin.buffer, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
