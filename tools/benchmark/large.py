"""Measure what the stages of an export take for a model whose weights exceed 2 GB. Called by `tools/large_model`.

The model has the shape of a large multilingual encoder, random weights from a fixed seed, and the tests' tokenizer.
Each stage runs in a process of its own; memory is the peak proportional set size of its process tree, mapped files
included.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmark.processes import Ran, measured
from edgeq.system.files import work_dir

GOAL = 1.5  # peak of calibrating, of the model's size in FP32
TARGET = "x86-64-onnxruntime"
_STAGE = """
import sys
from pathlib import Path
from edgeq.data.plans import plan_texts
from edgeq.frontend import locate
from edgeq.pipeline import stages
from edgeq.system.cache import Cache
folder, last = Path(sys.argv[1]), sys.argv[2]
cache = Cache(folder / "cache")
floats = stages.float_model(locate.locate(str(folder / "model"), "mean"), True, cache)
if last == "calibrate":
    plan = plan_texts(folder / "texts.txt", None, folder / "validation.txt", (), None, 0)
    stages.calibrated(floats, plan, 0, cache, lambda *_: None)
"""


def build(folder: Path, layers: int) -> None:
    """Write the model and its texts."""
    import tiny_source
    import torch
    import transformers

    tiny_source.body(folder / "model", layers=1)  # for its tokenizer
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=250_002, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder / "model")
    for name, count, seed in (("texts", 40, 1), ("validation", 24, 2)):
        (folder / f"{name}.txt").write_text("\n".join(tiny_source.texts(count, seed)), encoding="utf-8")


def main() -> int:
    """Build, export in three processes, print a line for each; exit 1 when one fails or calibrating takes too much."""
    parser = argparse.ArgumentParser(prog="tools/large_model", description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    with work_dir("edgeq-large-") as folder:
        build(folder, options.layers)
        size = (folder / "model" / "model.safetensors").stat().st_size / 1e9
        sys.stdout.write(f"{size:.2f} GB in FP32\n")
        script = [sys.executable, "-c", _STAGE, folder]
        words = [
            sys.executable, "-m", "edgeq", "export", folder / "model", "--pooling", "mean", "--target", TARGET,
            "--texts", folder / "texts.txt", "--validation", folder / "validation.txt", "--out", folder / "out",
        ]  # fmt: skip
        env = {**os.environ, "EDGEQ_CACHE_DIR": str(folder / "cache")}
        found = [
            _told("export to ONNX", measured([*script, "float"], folder / "float.log", env), size),
            _told("calibrate", measured([*script, "calibrate"], folder / "calibrate.log", env), size),
            _told("quantize, lower, compare", measured(words, folder / "rest.log", env), size),
        ]
    return int(any(ran.exit_code for ran in found) or found[1].peak_gb > GOAL * size)


def _told(stage: str, ran: Ran, size: float) -> Ran:
    line = f"{stage}: {ran.seconds:.0f} s, peak {ran.peak_gb:.2f} GB, {ran.peak_gb / size:.2f} of FP32"
    sys.stdout.write(line + (f", failed:\n{ran.log[-2000:]}" if ran.exit_code else "") + "\n")
    return ran


if __name__ == "__main__":
    sys.exit(main())
