"""Write 0 for the axes that a Reshape copies."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.data.batches import PIXELS
from edgeq.graph.edit import Rewrites, constant, dims, fix_shape


def copied_axes(model: ir.Model) -> Rewrites:
    """Replace the sizes that a `Reshape` in a model of images copies from its operand, as far as they lead, by 0.

    Before::

        x[batch, 197, 768] ─ Reshape[0, 197, 12, 64]

    After::

        x ─ Reshape[0, 0, 12, 64]

    A model of images has a fixed number of tokens, and its exporter writes it out. What takes one token of all moves
    past a Reshape that copies their axis.
    """
    if not any(value.name == PIXELS for value in model.graph.inputs):
        return Rewrites(0)
    count = 0
    for node in list(model.graph):
        target = constant(node.inputs[1]) if node.op_type == "Reshape" else None
        given = dims(node.inputs[0]) if target is not None else None
        if target is None or given is None or (target == -1).any() or 0 in target[1:]:
            continue
        sizes = [int(size) for size in target]
        wanted = dims(node.outputs[0]) or sizes
        for axis, (size, before) in enumerate(zip(sizes, given, strict=False)):
            if size != 0 and (size != before or len(wanted) <= axis + 1):
                break
            sizes[axis] = 0
        if not np.array_equal(sizes, target):
            fix_shape(model.graph, node, sizes)
            count += 1
    return Rewrites(count)
