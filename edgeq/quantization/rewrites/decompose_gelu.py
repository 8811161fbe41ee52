"""Decompose GELU into Erf for opsets that have no Gelu."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.errors import Unsupported
from edgeq.graph.edit import Rewrites, add_constant, add_node, replace_uses

FIRST_OPSET = 20  # that has Gelu as one operator


def decompose_gelu(model: ir.Model, statistics: Observed) -> Rewrites:
    """Replace every exact Gelu by x · (1 + erf(x / √2)) · 0.5.

    Before::

        x ─ Gelu

    After::

        x ─┬─ Div(sqrt 2) ─ Erf ─ Add(1) ─┬─ Mul ─ Mul(0.5)
           └──────────────────────────────┘

    Raises:
        Unsupported: it is approximated.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "Gelu" else None
        if x is None:
            continue
        name = str(node.outputs[0].name)
        kind = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
        if kind != "none":
            raise Unsupported(
                f"{node.name}: Gelu by {kind} has no form before opset 20. Take a target of another vendor."
            )
        numbers = {"root": math.sqrt(2.0), "one": 1.0, "half": 0.5}
        root, one, half = (_number(graph, f"gelu_{key}", number) for key, number in numbers.items())
        inner = add_node(node, "Div", [x, root], f"{name}/inner")
        error = add_node(node, "Erf", [inner], f"{name}/erf")
        share = add_node(node, "Add", [error, one], f"{name}/share")
        product = add_node(node, "Mul", [x, share], f"{name}/product")
        result = add_node(node, "Mul", [product, half], f"{name}/gelu")
        replace_uses(node.outputs[0], result)
        graph.remove(node, safe=True)
        count += 1
    return Rewrites(count)


def _number(graph: ir.Graph, name: str, number: float) -> ir.Value:
    known = graph.initializers.get(name)
    return known if known is not None else add_constant(graph, name, np.array(number, np.float32))
