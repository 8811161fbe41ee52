"""Write shapes of Reshape as constants where inference does not know them, by running the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import Rewrites, constant, fix_shape, replace_uses
from edgeq.graph.evaluate import measured_shapes


def measured_reshape(model: ir.Model) -> Rewrites:
    """Replace a computed shape of `Reshape` by a constant with 0 for kept and -1 for one inferred dimension.

    Before::

        Shape(x) ─ Gather, Mul, … ─ Concat ─ Reshape

    After::

        Reshape(·, [0, 0, 64])

    `constant_reshape` reads what shape inference knows; the rest is measured here, and so is a -1 that was given. A
    dimension that is the same for every batch and length is that number, one that is always the input's at its place
    is 0, and one other may be -1. A `Reshape` that never changes anything goes.
    """
    nodes = [node for node in model.graph if node.op_type == "Reshape" and _is_open(node)]
    if not nodes:
        return Rewrites(0)
    count, near = 0, []
    for node, before, after in zip(nodes, *_measured(model, nodes), strict=True):
        shape, given = _shape(before, after), constant(node.inputs[1])
        if given is not None and shape is not None and -1 in shape:
            continue
        if np.array_equal(before, after) and node.inputs[0] is not None:
            replace_uses(node.outputs[0], node.inputs[0])
            count += 1
            continue
        if shape is None:
            near.append(f"{node.name}: gives {after.tolist()} from {before.tolist()}, which no constant shape does")
            continue
        fix_shape(model.graph, node, shape)
        count += 1
    return Rewrites(count, tuple(near))


def _is_open(node: ir.Node) -> bool:
    """Tell whether a shape is computed, or leaves a dimension to be inferred."""
    shape = constant(node.inputs[1])
    return shape is None or -1 in shape


def _measured(model: ir.Model, nodes: list[ir.Node]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Give for each node its input's and its output's dimensions, int64[sizes, dimensions] each."""
    values = [value for node in nodes for value in (node.inputs[0], node.outputs[0]) if value is not None]
    measured = measured_shapes(model, values)
    return measured[0::2], measured[1::2]


def _shape(before: NDArray[np.int64], after: NDArray[np.int64]) -> list[int] | None:
    shape: list[int] = []
    for position, sizes in enumerate(after.T):
        if np.all(sizes == sizes[0]):
            shape.append(int(sizes[0]))
        elif position < before.shape[1] and np.array_equal(sizes, before[:, position]):
            shape.append(0)
        else:
            shape.append(-1)
    return shape if shape.count(-1) <= 1 else None
