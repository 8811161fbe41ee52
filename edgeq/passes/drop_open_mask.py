"""Remove a mask that masks nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, constant, dims, made_by, replace_uses


def drop_open_mask(model: ir.Model) -> Rewrites:
    """Remove the `Add` of `Where(·, 0, fill)` where the condition is one constant that leaves zeros only.

    Before::

        true[1, 1, n, 1] ─ Expand ─ Where(·, 0, -3.4e38) ─┐
                                                   scores ┴─ Add ─ Softmax

    After::

        scores ─ Softmax

    Attention over an image sees every patch, and so does that over texts without padding: the exporter keeps the mask
    that says so.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        for position, value in enumerate(node.inputs):
            where, rest = made_by(value, "Where"), node.inputs[1 - position]
            if where is None or rest is None or not _is_constant_condition(where):
                continue
            if not _is_open(where):
                near.append(f"{node.name}: adds a constant mask that hides something")
            elif dims(rest) is None or dims(rest) != dims(node.outputs[0]):
                near.append(f"{node.name}: the sum has another shape than {rest.name}")
            else:
                replace_uses(node.outputs[0], rest)
                count += 1
                break
    return Rewrites(count, tuple(near))


def _condition(where: ir.Node) -> ir.Value | None:
    expand = made_by(where.inputs[0], "Expand")
    return expand.inputs[0] if expand is not None else where.inputs[0]


def _is_constant_condition(where: ir.Node) -> bool:
    return constant(_condition(where)) is not None


def _is_open(where: ir.Node) -> bool:
    """Tell whether every branch that the condition takes is zero."""
    condition = np.asarray(constant(_condition(where)), np.bool_)
    taken = [constant(where.inputs[1])] if condition.any() else []
    taken += [constant(where.inputs[2])] if not condition.all() else []
    return all(array is not None and not array.any() for array in taken)
