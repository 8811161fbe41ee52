"""Make up statistics of a float model's tensors, for quantising that only looks for unsupported operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph.edit import dims
from edgeq.quantization.rewrites.decompose import DECOMPOSE
from edgeq.quantization.rewrites.observe_row_maxima import observe_row_maxima

_POSITIVE = frozenset({"Exp", "ReduceL2", "ReduceSumSquare", "Reciprocal", "Sigmoid", "Softmax", "Sqrt"})


def placeholders(model: onnx.ModelProto) -> Observed:
    """Give every float32 tensor of a model, and of its decomposed norms, one range for all channels.

    It is -1 to 1, or 0.5 to 1 behind an operator whose results are positive.

    Args:
        model: FP32 ONNX; not changed.
    """
    graph_model = ir.from_proto(model)
    for rewrite in (*DECOMPOSE, observe_row_maxima):
        rewrite(graph_model)
    made: Observed = {}
    for node in graph_model.graph:
        low = 0.5 if node.op_type in _POSITIVE else -1.0
        for value in node.outputs:
            if value.dtype in (None, ir.DataType.FLOAT):
                shape = dims(value)
                channels = shape[-1] if shape and isinstance(shape[-1], int) else 1
                ends = np.full((2, channels), [[low], [1.0]], np.float32)
                made[str(value.name)] = Statistics(ends[0], ends[1])
    return made
