"""Compute what depends on no input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, constant, replace_uses
from edgeq.graph.evaluate import of_constants

_LARGEST_ELEMENTS = 1 << 26  # a larger constant is left to the runtime: it may be a table over pairs of positions
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"})


def fold_constants(model: ir.Model) -> Rewrites:
    """Replace a node whose inputs are all constant by its result, where that is no larger than what it reads.

    Before::

        weight ─ Add(1) ─ Mul(x)

    After::

        weight + 1 ─ Mul(x)

    Only floating-point results count: the arithmetic of shapes is left to the passes that know what it means.
    """
    count, near = 0, []
    for node in list(model.graph):
        arrays = [constant(value) for value in node.inputs if value is not None]
        is_whole = arrays and len(arrays) == len(node.inputs) and all(array is not None for array in arrays)
        if not is_whole or node.op_type in _RANDOM or len(node.outputs) != 1 or node.domain not in ("", "ai.onnx"):
            continue
        if not any(array is not None and array.dtype.kind == "f" for array in arrays):
            continue
        if sum(array.size for array in arrays if array is not None) > _LARGEST_ELEMENTS:
            near.append(f"{node.name}: reads constants of more than {_LARGEST_ELEMENTS} elements")
            continue
        result = of_constants(node)
        largest = max(array.size for array in arrays if array is not None)
        if result is None or result.dtype != np.float32 or result.size > largest:
            near.append(f"{node.name}: its result is larger than what it reads, or not float32")
            continue
        replace_uses(node.outputs[0], add_constant(model.graph, f"{node.outputs[0].name}/folded", result))
        count += 1
    return Rewrites(count, tuple(near))
