"""Name weights and products after the module they came from."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, constant, made_by, readers


def name_weights(model: ir.Model) -> Rewrites:
    """Name a product, its weight and its sum after the bias that is added to it.

    Before::

        MatMul(x, val_54) ─ Add(….layer.0.attention.self.query.bias) ─ linear

    After::

        MatMul(x, ….layer.0.attention.self.query.weight) ─ Add(…) ─ ….layer.0.attention.self.query

    The exporter transposes weights into nameless constants; reports name tensors, so they need names.
    """
    count = 0
    taken = set(model.graph.initializers)
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" and len(node.inputs) == 2 else None
        if weight is None or constant(weight) is None:
            continue
        adds = [reader for reader in readers(node.outputs[0]) if reader.op_type == "Add"]
        bias = next((value for add in adds for value in add.inputs if constant(value) is not None), None)
        if bias is None or bias.name is None or ".bias" not in bias.name:
            continue
        stem = bias.name.split(".bias")[0]
        name = f"{stem}.weight"
        if name in taken or made_by(weight, "Constant") is not None:
            continue
        taken.add(name)
        if weight.name is not None and weight.name in model.graph.initializers:
            model.graph.initializers.pop(weight.name)
            weight.name = name
            if weight.const_value is not None:
                weight.const_value.name = name
            model.graph.initializers[name] = weight
        node.name = stem
        node.outputs[0].name = f"{stem}.product"
        if not adds[0].outputs[0].is_graph_output():
            adds[0].outputs[0].name = stem
        count += 1
    return Rewrites(count)
