"""Make OpenVINO models of the float ONNX file, with NNCF an int8 one: `python openvino_nncf.py JOB`.

A script of an environment of its own: nothing of edgeq is imported. JOB is JSON: {"float_model", "feeds", "out",
"form"}; form is "float32" or "int8".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov


def main() -> None:
    """Make what the job says."""
    job = json.loads(sys.argv[1])
    model = ov.convert_model(job["float_model"])
    if job["form"] == "int8":
        import nncf

        model = nncf.quantize(
            model, nncf.Dataset(feeds(job["feeds"])), model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds(job["feeds"])),
        )  # fmt: skip
    # In halves, as it would be by default, a float model would no longer be the one it was made of.
    ov.save_model(model, Path(job["out"]) / "model.xml", compress_to_fp16=False)


def feeds(path: str) -> list[dict[str, np.ndarray]]:
    """Give each calibration text at its own length."""
    with np.load(path) as file:
        names = ("input_ids", "attention_mask")
        lengths = file["attention_mask"].sum(axis=1)
        return [{name: file[name][[row], :length] for name in names} for row, length in enumerate(lengths)]


if __name__ == "__main__":
    main()
