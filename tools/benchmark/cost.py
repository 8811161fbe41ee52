"""Measure what exporting and calibrating cost."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmark.figures import Blank, Figures
from benchmark.making import Workshop, note
from benchmark.processes import last_line
from benchmark.rows import GEMM, OWN
from benchmark.samples import FILES
from edgeq.data.splits import deduplicate

SAMPLES = 512
COUNTS = (128, 2048)
SECOND_TARGET = "arm64-onnxruntime"  # of the same scheme as the first

_CALIBRATE = """
import json, sys
from pathlib import Path
import onnx
from edgeq.bundle.benchmark_child import peak_memory_bytes
from edgeq.data.tokenizer import Tokenizer
from edgeq.pipeline import calibrate
tokens = Tokenizer.from_file(Path(sys.argv[2]), 256).encode(json.loads(Path(sys.argv[3]).read_text()))
calibrate.calibrate(onnx.load(sys.argv[1]), tokens, 0, lambda *_: None)
print(peak_memory_bytes())
"""


def export(workshop: Workshop) -> Figures:
    """Export one target with 512 texts from an empty cache, then a second of the same scheme."""
    folder = workshop.folder / "timed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    first = next(row.target for row in OWN if row.name == GEMM)
    figures: Figures = {}
    for name, target in (("first", first), ("second", SECOND_TARGET)):
        note(f"export: {target}")
        ran = workshop.export(folder / "bundles", target, options=["--samples", str(SAMPLES)], cache=folder / "cache")
        blank = Blank(f"exit code {ran.exit_code}: {last_line(ran.log)}") if ran.exit_code else None
        figures |= {f"{name}_s": blank or ran.seconds, f"{name}_peak_gb": blank or ran.peak_gb}
    shutil.rmtree(folder)
    return figures


def calibration(workshop: Workshop, data: Path) -> Figures:
    """Calibrate on few and on many texts, each in a process of its own, and compare the peaks of their memory."""
    with gzip.open(data / FILES[2], "rt", encoding="utf-8") as file:
        texts = deduplicate([json.loads(line)["text"] for line in file])
    longest = sorted(texts, key=len)[-64:]  # in both: the longest text alone decides the largest batch
    others = np.random.default_rng(0).permutation(sorted(set(texts) - set(longest))).tolist()
    tokenizer = workshop.folder / "bundles" / OWN[0].target / "tokenizer.json"
    figures: Figures = {}
    for count in COUNTS:
        note(f"calibration: {count} texts")
        path = workshop.folder / f"calibration-{count}.json"
        path.write_text(json.dumps([*longest, *others][:count]), encoding="utf-8")
        words = [sys.executable, "-c", _CALIBRATE, str(workshop.float_model()), str(tokenizer), str(path)]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        figures[f"{count}_texts_gb"] = int(output.split()[-1]) / 1e9
    few, many = (figures[f"{count}_texts_gb"] for count in COUNTS)
    return {**figures, "ratio": many / few}
