"""Take away what a converter puts around a softmax of opset 12 or older."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_node, made_by, readers, replace_uses
from edgeq.graph.evaluate import feeds_of_ones, outputs_of


def unflatten_softmax(model: ir.Model) -> Rewrites:
    """Replace a softmax over all axes from k on, flattened, by one over the last axis, where k is the last.

    Before::

        x ─┬─ Flatten(k) ─ Softmax(-1) ─┐
           └─ Shape ─────────────────── Reshape

    After::

        x ─ Softmax(-1)
    """
    count, near = 0, []
    for node in list(model.graph):
        flat = made_by(node.inputs[0], "Flatten") if node.op_type == "Softmax" else None
        x = flat.inputs[0] if flat is not None else None
        if flat is None or x is None:
            continue
        backs = readers(node.outputs[0])
        if not backs or node.outputs[0].is_graph_output() or not all(_gives_back(back, x) for back in backs):
            near.append(f"{node.name}: a flattened softmax that is not brought back to its shape")
            continue
        axis, rank = flat.attributes["axis"].as_int() if "axis" in flat.attributes else 1, _rank(model, x)
        if axis not in (-1, rank - 1):
            near.append(f"{node.name}: a softmax over more than the last axis ({axis} of {rank})")
            continue
        last = add_node(node, "Softmax", [x], f"{node.name}/last", {"axis": -1})
        for back in backs:
            replace_uses(back.outputs[0], last)
        count += 1
    return Rewrites(count, tuple(near))


def _gives_back(node: ir.Node, x: ir.Value) -> bool:
    """Tell whether a node reshapes to the shape of x."""
    shape = made_by(node.inputs[1], "Shape") if node.op_type == "Reshape" else None
    return shape is not None and shape.inputs[0] is x


def _rank(model: ir.Model, value: ir.Value) -> int:
    (sizes,) = outputs_of(model, [value], shapes=True).run(None, feeds_of_ones(model, 2, 3))
    return len(sizes)
