"""Fold the gain of a decomposed RMSNorm into SmoothQuant's factors behind it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, constant, readers, required
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.affine_statistics import affine


def fold_norm_gain(model: ir.Model, statistics: Observed) -> Rewrites:
    """Multiply gain and factor where a normalisation without bias is scaled for products; give how many there are.

    Before::

        normalized ─ Mul(gain) ─┬─ Mul(factor) ─ MatMul
                                └─ residual

    After::

        normalized ─┬─ Mul(gain factor) ─ MatMul
                    └─ Mul(gain) ─ residual

    A normalisation with bias is left to `fold_norm_bias`.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        gain = constant(node.inputs[1]) if roles.has(node, Role.NORM_GAIN) else None
        output = node.outputs[0]
        if gain is None or any(roles.has(reader, Role.NORM_BIAS) for reader in readers(output)):
            continue
        normalized = required(node.inputs[0])
        if str(output.name) not in statistics:
            statistics[str(output.name)] = affine(statistics[str(normalized.name)], gain, 0.0)
        for use in tuple(output.uses()):
            factor = constant(use.node.inputs[1]) if use.node.op_type == "Mul" and use.idx == 0 else None
            if factor is None or any(each.op_type != "MatMul" for each in readers(use.node.outputs[0])):
                continue
            name = f"{use.node.outputs[0].name}/gain"
            use.node.replace_input_with(0, normalized)
            use.node.replace_input_with(1, add_constant(graph, name, (gain * factor).astype(np.float32)))
            count += 1
    return Rewrites(count)
