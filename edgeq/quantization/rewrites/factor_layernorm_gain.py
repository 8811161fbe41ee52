"""In a decomposed LayerNorm multiply the gain by 1/sigma first, so that each value is multiplied once, not twice.

Gain and one over the row's length become one factor, an outer product of two small tensors. It serves schemes that add
up residuals in int32: there a product of two int16 tensors is a term of the sum, and is not quantised by itself.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, made_by, readers, required
from edgeq.graph.roles import Role

FACTOR = "/factor_of_rows"


def factor_layernorm_gain(model: ir.Model, statistics: Observed) -> Rewrites:
    """Multiply gain by one over the length first, and centred rows by that; give how many products there are.

    Before::

        centred ─ Mul(inverse) ─┬─ Mul(gain) ─┬─ sum
                                │             └─ pooling
                                └─ Mul(scaled gain) ─ MatMul

    After::

        inverse ─┬─ Mul(gain) ───────── Mul(centred) ─ sum
                 ├─ Mul(gain) ───────── Mul(centred) ─ pooling
                 └─ Mul(scaled gain) ── Mul(centred) ─ MatMul
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        normalized = made_by(node.inputs[0], "Mul") if node.op_type == "Mul" else None
        gain = constant(node.inputs[1]) if normalized is not None else None
        if normalized is None or gain is None or not roles.has(normalized, Role.NORM_NORMALIZED):
            continue
        centred, inverse = normalized.inputs
        if centred is None or inverse is None or not _share_input(graph, node):
            continue
        inputs = [inverse, required(node.inputs[1])]
        first = add_node(node, "Mul", inputs, f"{node.name}{FACTOR}", role=Role.ROW_FACTOR)
        node.replace_input_with(0, centred)
        node.replace_input_with(1, first)
        count += 1 + _own_product(node, statistics)
    return Rewrites(count)


def _share_input(graph: ir.Graph, node: ir.Node) -> bool:
    """Let the outlier branch read what the other products of this LayerNorm read, its weights scaled to fit."""
    products = [use for use in readers(node.outputs[0]) if use.op_type == "MatMul"]
    outliers = [use for use in products if roles.has(use, Role.OUTLIER_BRANCH)]
    normalized = node.inputs[0]
    others = [use for use in readers(normalized) if use is not node and use.op_type == "Mul"] if normalized else []
    scaled = next((use for use in others if not roles.has(use, Role.NORM_GAIN)), None)
    factor = constant(scaled.inputs[1]) if scaled is not None else None
    gain = constant(node.inputs[1])
    if scaled is None or factor is None or gain is None or np.any(factor == 0.0):
        return True
    for product in outliers:
        weight = constant(product.inputs[1])
        if weight is None:
            return False
        fitted = weight * (gain / factor)[:, None]
        name = str(required(product.inputs[1]).name)
        product.replace_input_with(0, scaled.outputs[0])
        product.replace_input_with(1, add_constant(graph, name, fitted.astype(np.float32)))
    return True


def _own_product(node: ir.Node, statistics: Observed) -> int:
    """Give every reader that is no product with weights a product of its own: each rounds it with its own scale."""
    output = node.outputs[0]
    name = str(output.name)
    sums = [use for use in tuple(output.uses()) if use.node.op_type != "MatMul" or constant(use.node.inputs[1]) is None]
    keep = 0 if len(sums) == len(output.uses()) else 1
    for number, use in enumerate(sums[1 - keep :], start=1):
        centred, factor = node.inputs
        gain_of = made_by(factor, "Mul")
        if centred is None or gain_of is None:
            raise ValueError(f"{node.name} is no product of rows")
        inputs = [value for value in gain_of.inputs if value is not None]
        own = add_node(node, "Mul", inputs, f"{node.name}/{number}{FACTOR}", role=Role.ROW_FACTOR)
        copy = add_node(node, "Mul", [centred, own], f"{name}/{number}", like=output)
        statistics[f"{name}/{number}"] = statistics[name]
        use.node.replace_input_with(use.idx, copy)
    return max(0, len(sums) - 1 + keep)
