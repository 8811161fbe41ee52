"""Let ONNX Runtime's own tools quantise the float ONNX file: `python onnxruntime_tools.py JOB`.

JOB is JSON: {"float_model", "feeds", "out", "form"}; form is "dynamic" or "static", each with the tools' defaults but
for scales per channel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import quantization


class Reader(quantization.CalibrationDataReader):
    """Feed one text at a time, all padded to one length: it refuses ranges of different shapes."""

    def __init__(self, path: str) -> None:
        """Read the feeds."""
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("input_ids", "attention_mask")}
        count = len(arrays["input_ids"])
        self._feeds = iter([{name: array[[row]] for name, array in arrays.items()} for row in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Give the next text's feeds."""
        return next(self._feeds, None)


def main() -> None:
    """Make what the job says."""
    job = json.loads(sys.argv[1])
    out = str(Path(job["out"]) / "model.onnx")
    if job["form"] == "dynamic":
        quantization.quantize_dynamic(job["float_model"], out, per_channel=True)
    else:
        quantization.quantize_static(job["float_model"], out, Reader(job["feeds"]), per_channel=True)


if __name__ == "__main__":
    main()
