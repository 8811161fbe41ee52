"""Give what SmoothQuant scales a LayerNormalization of its own, for compilers that fold a Mul into weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, made_by, replace_uses
from edgeq.quantization.rewrites.norm_parts import graph_of


def split_scaled_layer_normalization(model: ir.Model, statistics: Observed) -> Rewrites:
    """Replace a Mul of a LayerNormalization's output by a second LayerNormalization with another gain and bias.

    Before::

        x ─ LayerNormalization(gain, bias) ─┬─ Mul(factor) ─ MatMul
                                            └─ Add

    After::

        x ─┬─ LayerNormalization(gain · factor, bias · factor) ─ MatMul
           └─ LayerNormalization(gain, bias) ─ Add

    A compiler that folded the Mul into the weights of the MatMul would undo the smoothing.
    """
    return Rewrites(sum(_split(node) for node in list(model.graph) if node.op_type == "Mul"))


def _split(node: ir.Node) -> bool:
    graph = graph_of(node)
    for value, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
        norm, factor = made_by(value, "LayerNormalization"), constant(other)
        arrays = [constant(item) for item in norm.inputs[1:]] if norm is not None else [None]
        parts = [array for array in arrays if array is not None]
        if norm is None or norm.inputs[0] is None or factor is None or len(parts) < len(arrays):
            continue
        if any(array.shape != factor.shape for array in parts):
            continue
        name = str(node.outputs[0].name)
        scaled = [
            add_constant(graph, f"{name}/{part}", (array * factor).astype(np.float32))
            for part, array in zip(("gain", "bias"), parts, strict=False)
        ]
        attributes = {key: item.value for key, item in norm.attributes.items() if item.value is not None}
        result = add_node(node, "LayerNormalization", [norm.inputs[0], *scaled], f"{name}/norm", attributes)
        replace_uses(node.outputs[0], result)
        graph.remove(node, safe=True)
        return True
    return False
