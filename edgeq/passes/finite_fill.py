"""Give max pooling a finite value for padding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, constant, readers

FILL = -1e4  # below every token value; an infinite one would be the range of whatever it meets
_INFINITE = -1e30


def finite_fill(model: ir.Model) -> Rewrites:
    """Replace an infinite constant that padding is filled with, where only a maximum reads it.

    Before::

        Where(mask, -inf, h) ─ ReduceMax

    After::

        Where(mask, -1e4, h) ─ ReduceMax
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Where":
            continue
        for position in (1, 2):
            array = constant(node.inputs[position])
            if array is None or array.size != 1 or not array.reshape(-1)[0] <= _INFINITE:
                continue
            if not all(reader.op_type == "ReduceMax" for reader in readers(node.outputs[0])):
                near.append(f"{node.name}: an infinite fill that something other than a maximum reads")
                continue
            fill = add_constant(model.graph, "pooling_fill", np.full(array.shape, FILL, np.float32))
            node.replace_input_with(position, fill)
            count += 1
    return Rewrites(count, tuple(near))
