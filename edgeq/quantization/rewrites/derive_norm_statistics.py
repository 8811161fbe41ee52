"""Derive the statistics of whole LayerNormalization and RMSNormalization outputs from their decomposed form's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph.edit import Rewrites, constant
from edgeq.quantization.rewrites.norm_parts import NORMALIZED

_NORMS = ("LayerNormalization", "RMSNormalization")  # the second has no bias


def derive_norm_statistics(model: ir.Model, statistics: Observed) -> Rewrites:
    """Give each LayerNormalization and RMSNormalization the range gain · sqrt(n) · normalized + bias; the graph stays.

    Calibration observes the normalised rows inside the decomposed form, which schemes with whole norms
    do not have.

    Returns:
        No rewrites: the statistics alone change.
    """
    for node in model.graph:
        name = str(node.outputs[0].name)
        if node.op_type not in _NORMS or name in statistics or f"{name}{NORMALIZED}" not in statistics:
            continue
        inner, gain = statistics[f"{name}{NORMALIZED}"], constant(node.inputs[1])
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.float32)
        if gain is None or bias is None:
            continue
        ends = [end * gain * np.sqrt(gain.shape[-1]) + bias for end in (inner.minimum, inner.maximum)]
        statistics[name] = Statistics(np.minimum(*ends).astype(np.float32), np.maximum(*ends).astype(np.float32))
    return Rewrites(0)
