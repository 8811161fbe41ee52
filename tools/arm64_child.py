"""Run token ids through a .tflite file and write the codes that come out. Called by `tools/arm64_compare.py`.

numpy and ai_edge_litert are all it imports: it runs on machines, emulated ones too, where edgeq is not installed.

`python arm64_child.py MODEL FEEDS CODES`. FEEDS is an .npz with three arrays for each length it has texts for, say 16:
`rows_16` int64[batch], the place of each text among all; `input_ids_16` and `attention_mask_16` int32[batch, 16]. The
signature `seq_16` of MODEL takes them one text at a time. CODES is written as an .npz: `codes` int8[texts, dim], and
for each text its output tensor's `scale` float32[texts] and `zero_point` int64[texts]. stdout has one line of JSON:
where it ran.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

INPUTS = ("input_ids", "attention_mask")
OUTPUT = "sentence_embedding"


def output_scale(details: dict[str, Any], name: str) -> tuple[float, int]:
    """Give scale and zero point of a signature's output, which must be int8 with one scale."""
    if OUTPUT not in details:
        sys.exit(f"{name}: has the outputs {sorted(details)}; {OUTPUT} is needed")
    tensor = details[OUTPUT]
    affine = tensor["quantization_parameters"]
    if tensor["dtype"] is not np.int8 or len(affine["scales"]) != 1 or len(affine["zero_points"]) != 1:
        scales = len(affine["scales"])
        sys.exit(f"{name}: {OUTPUT} is {np.dtype(tensor['dtype'])} with {scales} scales; int8 with 1 is needed")
    return float(affine["scales"][0]), int(affine["zero_points"][0])


def run_signature(runner: Any, name: str, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, float, int]:
    """Run every text of one length; give codes int8[batch, dim], scale and zero point."""
    takes = runner.get_input_details()
    if set(takes) != set(INPUTS):
        sys.exit(f"{name}: has the inputs {sorted(takes)}; {' and '.join(INPUTS)} are needed")
    scale, zero_point = output_scale(runner.get_output_details(), name)
    batch = len(arrays["rows"])
    # Copied: the next call writes into the same memory.
    rows = [runner(**{key: arrays[key][row : row + 1] for key in INPUTS})[OUTPUT].copy() for row in range(batch)]
    return np.concatenate(rows), scale, zero_point


def main(model: Path, feeds: Path, out: Path) -> None:
    """Run all lengths, and write the codes in the order of the texts."""
    with np.load(feeds, allow_pickle=False) as archive:
        arrays = dict(archive)
    lengths = sorted(int(key.removeprefix("rows_")) for key in arrays if key.startswith("rows_"))
    texts = sum(len(arrays[f"rows_{length}"]) for length in lengths)
    interpreter = Interpreter(model_path=str(model))
    known = interpreter.get_signature_list()
    scales, zero_points = np.zeros(texts, np.float32), np.zeros(texts, np.int64)
    codes: np.ndarray | None = None
    for length in lengths:
        name = f"seq_{length}"
        if name not in known:
            sys.exit(f"{model.name}: has the signatures {sorted(known)}; {name} is needed")
        rows = arrays[f"rows_{length}"]
        own = {key: arrays[f"{key}_{length}"] for key in ("rows", *INPUTS)}
        found, scale, zero_point = run_signature(interpreter.get_signature_runner(name), name, own)
        if codes is None:
            codes = np.zeros((texts, found.shape[1]), np.int8)
        codes[rows], scales[rows], zero_points[rows] = found, scale, zero_point
    if codes is None:
        sys.exit(f"{feeds.name}: holds no texts; at least one is needed")
    partial = out.with_name(f"{out.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, codes=codes, scale=scales, zero_point=zero_points)
    partial.replace(out)
    tools = {name: version(name) for name in ("ai-edge-litert", "numpy")}
    print(json.dumps({"machine": platform.machine(), "tools": {**tools, "python": platform.python_version()}}))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: arm64_child.py MODEL FEEDS CODES")
    main(*(Path(word) for word in sys.argv[1:]))
