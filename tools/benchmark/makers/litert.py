"""Make a .tflite with litert-torch, and with ai-edge-quantizer an int8 one of it: `python litert.py JOB`.

A script of an environment of its own: nothing of edgeq is imported. JOB is JSON: {"source", "feeds", "base", "out",
"form", "buckets"}; form is "float32", or "w8a8" of the float file `base`. A file has a signature for each length, like
edgeq's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import litert_torch
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

THREADS = 2


class Embedding(torch.nn.Module):
    """Put mean pooling and unit length behind the encoder: tokens in, unit vector out."""

    def __init__(self, source: str) -> None:
        """Load the encoder."""
        super().__init__()
        self.encoder = SentenceTransformer(source, device="cpu")[0].auto_model.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Give float32[batch, dim]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).float()
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))


def export(source: str, buckets: list[int], path: Path) -> None:
    """Write the float file."""
    module = Embedding(source).eval()
    conversion = litert_torch
    for bucket in buckets:
        # Two tensors: given one for both, torch.export takes them for one input, and the file reads ids from the mask.
        names = ("input_ids", "attention_mask")
        inputs = {name: torch.ones(1, bucket, dtype=torch.int32) for name in names}
        conversion = conversion.signature(f"seq_{bucket}", module, sample_kwargs=inputs)
    conversion.convert().export(str(path))


def quantize(path: Path, buckets: list[int], feeds: Path, out: Path) -> None:
    """Write the int8 file: the recipe that its makers ship, on the same texts at every length."""
    from ai_edge_quantizer import quantizer, recipe

    with np.load(feeds) as file:
        rows = {name: file[name].astype(np.int32) for name in ("input_ids", "attention_mask")}

    def fed(bucket: int) -> list[dict[str, np.ndarray]]:
        count = len(rows["input_ids"])
        return [{name: fitted(array[row], bucket) for name, array in rows.items()} for row in range(count)]

    made = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
    ranges = made.calibrate({f"seq_{bucket}": fed(bucket) for bucket in buckets}, num_threads=THREADS)
    made.quantize(ranges).export_model(str(out))


def fitted(row: np.ndarray, bucket: int) -> np.ndarray:
    """Cut or pad one text with zeros: int32[1, bucket]."""
    kept = row[:bucket]
    return np.pad(kept, (0, bucket - len(kept)))[None]


def main() -> None:
    """Make what the job says."""
    job = json.loads(sys.argv[1])
    out = Path(job["out"])
    if job["form"] == "float32":
        export(job["source"], job["buckets"], out / "model.tflite")
    else:
        quantize(Path(job["base"]), job["buckets"], Path(job["feeds"]), out / "model.tflite")


if __name__ == "__main__":
    main()
