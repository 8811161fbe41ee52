"""Divide by a constant by multiplying: Mul has an integer form, Div has none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.dataflow import mask_values, shape_values
from edgeq.graph.edit import Rewrites, add_constant, add_node, replace_uses, scalar


def divide_by_multiplying(model: ir.Model) -> Rewrites:
    """Replace Div by one number by Mul by its inverse, FP32; what follows from mask or sizes alone stays.

    Before::

        x ─ Div(c)

    After::

        x ─ Mul(1 / c)
    """
    known = mask_values(model.graph) | shape_values(model.graph)
    count = 0
    for node in list(model.graph):
        divisor = scalar(node.inputs[1]) if node.op_type == "Div" else None
        x, output = node.inputs[0] if divisor else None, node.outputs[0]
        if divisor is None or x is None or x.dtype not in (None, ir.DataType.FLOAT) or output in known:
            continue
        inverse = add_constant(model.graph, f"{node.name}/inverse", np.array(1.0 / divisor, np.float32))
        result = add_node(node, "Mul", [x, inverse], f"{node.name}/product", like=output)
        name = str(output.name)
        replace_uses(output, result)
        if not result.is_graph_output():
            output.name, result.name = f"{name}/divided", name
        model.graph.remove(node, safe=True)
        count += 1
    return Rewrites(count)
