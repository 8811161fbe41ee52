"""Read a .tflite file with TensorFlow's schema and analyser: `python tensorflow_child.py FILE` prints one JSON object.

A script for an environment where edgeq is not installed: it imports the standard library and TensorFlow only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its start-up messages

import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema


def tensors(data: bytes) -> list[dict[str, Any]]:
    """Give dtype, shape and quantisation parameters of every tensor of every subgraph."""
    dtypes = {number: name.lower() for name, number in vars(schema.TensorType).items() if not name.startswith("_")}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    found = []
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            codes = tensor.quantization
            is_coded = codes is not None and codes.scale is not None
            found.append(
                {
                    "graph": graph.name.decode(),
                    "name": tensor.name.decode(),
                    "dtype": dtypes[tensor.type],
                    "shape": [] if tensor.shape is None else [int(size) for size in tensor.shape],
                    "scale": [float(scale) for scale in codes.scale] if is_coded else [],
                    "zero_point": [int(number) for number in codes.zeroPoint] if is_coded else [],
                    "axis": int(codes.quantizedDimension) if is_coded else 0,
                }
            )
    return found


def main() -> int:
    path = sys.argv[1]
    analysis = io.StringIO()
    with contextlib.redirect_stdout(analysis):
        tf.lite.experimental.Analyzer.analyze(model_path=path)
    found = {"version": tf.__version__, "tensors": tensors(Path(path).read_bytes()), "analysis": analysis.getvalue()}
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
