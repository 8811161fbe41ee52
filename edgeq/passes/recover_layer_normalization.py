"""Find LayerNormalization in its decomposed form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.passes.graph import Rewrites, add_node, constant, made_by, readers, replace_uses, scalar


def recover_layer_normalization(model: ir.Model) -> Rewrites:
    """Replace mean, variance, division, weight and bias by one `LayerNormalization`.

    Before::

        x ─┬─ ReduceMean(-1) ─┐
           └──────────────── Sub ─┬─ Pow(2) or Mul ─ ReduceMean(-1) ─ Add(eps) ─ Sqrt ─┐
                                  └────────────────────────────────────────────────── Div ─ Mul(w) ─ Add(b)

    After::

        x ─ LayerNormalization(w, b, axis -1, eps)
    """
    count, near = 0, []
    for node in list(model.graph):
        root = made_by(node.inputs[1], "Sqrt") if node.op_type == "Div" else None
        centred = made_by(node.inputs[0], "Sub") if root is not None else None
        if root is None or centred is None:
            continue
        epsilon = _epsilon(root, centred)
        tail = _weight_and_bias(node)
        if epsilon is None or tail is None:
            near.append(f"{node.name}: a division by a root, but not the rest of a layer normalisation")
            continue
        end, weight, bias = tail
        x = centred.inputs[0]
        if x is None:
            continue
        attributes = {"axis": -1, "epsilon": epsilon}
        replace_uses(
            end.outputs[0], add_node(end, "LayerNormalization", [x, weight, bias], f"{end.name}/norm", attributes)
        )
        count += 1
    return Rewrites(count, tuple(near))


def _epsilon(root: ir.Node, centred: ir.Node) -> float | None:
    """Give epsilon when the root is that of the mean square of `centred` plus epsilon, over the last axis."""
    add = made_by(root.inputs[0], "Add")
    mean = made_by(add.inputs[0], "ReduceMean") if add is not None else None
    square = made_by(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    first = made_by(centred.inputs[1], "ReduceMean")
    if add is None or mean is None or square is None or first is None or first.inputs[0] is not centred.inputs[0]:
        return None
    d = centred.outputs[0]
    is_square = square.inputs[0] is d and (square.inputs[1] is d or scalar(square.inputs[1]) == 2.0)
    return scalar(add.inputs[1]) if is_square and _is_last_axis(mean) and _is_last_axis(first) else None


def _is_last_axis(node: ir.Node) -> bool:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints()) == [-1]
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and np.array_equal(axes.reshape(-1), [-1])


def _weight_and_bias(division: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value] | None:
    """Follow the division through Mul(weight) and Add(bias)."""
    node, found = division, []
    for op_type in ("Mul", "Add"):
        after = readers(node.outputs[0])
        if len(after) != 1 or after[0].op_type != op_type:
            return None
        node = after[0]
        factor = next((value for value in node.inputs if constant(value) is not None), None)
        if factor is None:
            return None
        found.append(factor)
    return node, found[0], found[1]
