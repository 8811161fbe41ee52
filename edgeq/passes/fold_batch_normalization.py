"""Write batch normalisation, which computes with stored means and variances, as a product and a sum."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, replace_uses

_EPSILON = 1e-5  # where the node states none


def fold_batch_normalization(model: ir.Model) -> Rewrites:
    """Replace `BatchNormalization` by a `Mul` with one factor a channel and an `Add`.

    Before::

        x[batch, channels, …] ─ BatchNormalization(gain, bias, mean, variance)

    After::

        x ─ Mul(gain / sqrt(variance + epsilon)) ─ Add(bias - mean * gain / sqrt(variance + epsilon))
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "BatchNormalization":
            continue
        gain, bias, mean, variance = (constant(value) for value in node.inputs[1:5])
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        is_training = "training_mode" in node.attributes and node.attributes["training_mode"].as_int() != 0
        if gain is None or bias is None or mean is None or variance is None or shape is None or is_training:
            near.append(f"{node.name}: its means and variances are no constants, or the rank of its input is not known")
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else _EPSILON
        factor = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        x = node.inputs[0]
        for op_type, row in (("Mul", factor), ("Add", bias - mean * factor)):
            stored = row.astype(np.float32).reshape(-1, *[1] * (len(shape) - 2))
            name = f"{node.name}/{'factor' if op_type == 'Mul' else 'shift'}"
            x = add_node(node, op_type, [x, add_constant(model.graph, f"{name}s", stored)], name, like=node.inputs[0])  # type: ignore[list-item]
        replace_uses(node.outputs[0], x)  # type: ignore[arg-type]
        count += 1
    return Rewrites(count, tuple(near))
