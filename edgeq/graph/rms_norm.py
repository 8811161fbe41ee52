"""Find RMSNorm, for which the dialect has no operator: Pow, ReduceMean, Add, Sqrt, Reciprocal and Mul."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import constant, made_by, scalar


@dataclass(frozen=True)
class RootMeanSquare:
    """Hold the parts of an RMSNorm, x / sqrt(mean(x²) + epsilon) * gain, over the last axis.

    Attributes:
        x: what is normalised.
        epsilon: under the root.
        gain: float32[channels].
        position: of the gain among the inputs of `end`.
        end: the Mul of the gain.
    """

    x: ir.Value
    epsilon: float
    gain: NDArray[np.float32]
    position: int
    end: ir.Node


def root_mean_square(end: ir.Node | None) -> RootMeanSquare | None:
    """Find the RMSNorm that ends with a Mul by its gain, or give None.

    It looks for::

        x ─┬─ Pow(2) or Mul ─ ReduceMean(-1) ─ Add(epsilon) ─ Sqrt ─ Reciprocal ─ Mul ─ Mul(gain)
           └──────────────────────────────────────────────────────────────────────┘

    where Sqrt and Reciprocal may also be a Div by the root.
    """
    if end is None or end.op_type != "Mul":
        return None
    position = next((at for at, value in enumerate(end.inputs) if constant(value) is not None), -1)
    gain = constant(end.inputs[position]) if position >= 0 else None
    if gain is None or gain.ndim == 0 or gain.size != gain.shape[-1]:
        return None
    found = _normalized(end.inputs[1 - position])
    return None if found is None else RootMeanSquare(found[0], found[1], gain.reshape(-1), position, end)


def _normalized(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """Give x and epsilon where a value is x / sqrt(mean(x²) + epsilon)."""
    node = made_by(value, "Mul", "Div")
    if node is None:
        return None
    for position in (0, 1) if node.op_type == "Mul" else (0,):
        x, factor = node.inputs[position], node.inputs[1 - position]
        inverse = made_by(factor, "Reciprocal") if node.op_type == "Mul" else None
        root = made_by(inverse.inputs[0] if inverse is not None else factor, "Sqrt")
        is_inverse = node.op_type == "Div" or inverse is not None
        add = made_by(root.inputs[0], "Add") if root is not None and is_inverse else None
        if add is None or x is None:
            continue
        for side in (0, 1):
            epsilon, mean = scalar(add.inputs[side]), made_by(add.inputs[1 - side], "ReduceMean")
            if epsilon is not None and mean is not None and _is_mean_square(mean, x):
                return x, epsilon
    return None


def _is_mean_square(mean: ir.Node, x: ir.Value) -> bool:
    square = made_by(mean.inputs[0], "Pow", "Mul")
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if square is None or axes is None or square.inputs[0] is not x:
        return False
    rank = len(x.shape) if x.shape is not None else 0
    is_last = axes.reshape(-1).tolist() in ([-1], [rank - 1])
    is_square = square.inputs[1] is x if square.op_type == "Mul" else scalar(square.inputs[1]) == 2.0
    return is_last and is_square
