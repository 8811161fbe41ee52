"""Write a Gemm with constant weights as MatMul and Add, the form of every other product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, replace_uses


def split_gemm(model: ir.Model) -> Rewrites:
    """Replace `Gemm` by `MatMul` and `Add`; its factors and transposition go into the weights.

    Before::

        x ─ Gemm(W, b, alpha, beta, transB)

    After::

        x ─ MatMul(alpha Wᵀ) ─ Add(beta b)
    """
    count, near = 0, []
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Gemm":
            continue
        x, weight = node.inputs[0], constant(node.inputs[1])
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.float32)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if x is None or weight is None or bias is None or attributes.get("transA", 0):
            near.append(f"{node.name}: weights or bias are computed, or the left operand is transposed")
            continue
        straight = weight.T if attributes.get("transB", 0) else weight
        stem = str(node.inputs[1].name if node.inputs[1] is not None else node.name)
        values = add_constant(graph, f"{stem}/straight", straight * np.float32(attributes.get("alpha", 1.0)))
        output = add_node(node, "MatMul", [x, values], f"{node.name}/product")
        if len(node.inputs) > 2:
            summand = add_constant(graph, f"{stem}/bias", bias * np.float32(attributes.get("beta", 1.0)))
            output = add_node(node, "Add", [output, summand], f"{node.name}/sum")
        replace_uses(node.outputs[0], output)
        count += 1
    return Rewrites(count, tuple(near))
