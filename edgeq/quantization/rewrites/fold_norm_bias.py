"""Fold the bias of a decomposed LayerNormalization into what reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed
from edgeq.graph import roles
from edgeq.graph.edit import (
    Rewrites,
    add_constant,
    add_node,
    constant,
    insert_after,
    made_by,
    readers,
    required,
)
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.affine_statistics import affine
from edgeq.quantization.rewrites.norm_parts import GAINED, NORMALIZED
from edgeq.quantization.rewrites.product_bias import add_to_bias, bias_add, biased_end, shift_input


@dataclass(frozen=True)
class _Norm:
    """Hold the end of a decomposed LayerNormalization: its name, tensors, gain, bias, and the Add of the bias."""

    name: str
    normalized: ir.Value
    gained: ir.Value
    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    add: ir.Node


def fold_norm_bias(model: ir.Model, statistics: Observed) -> Rewrites:
    """Move LayerNorm's bias into the biases of what reads it; give how many readers there were.

    Before::

        normalized ─ Mul(gain) ─ Add(b) ─┬─ MatMul(W) ─ Add(c)
                                         ├─ Mul(factor) ─ MatMul(V) ─ Add(d)
                                         ├─ Add(MatMul(U) ─ Add(e))
                                         └─ pooling

    After::

        normalized ─┬─ Mul(gain) ─┬─ MatMul(W) ─ Add(c + b W)
                    │             ├─ Add(MatMul(U) ─ Add(e + b))
                    │             └─ pooling ─ Add(b)
                    └─ Mul(gain factor) ─ MatMul(V) ─ Add(d + b factor V)

    Pooling weights add up to one, so that the bias may be added behind. A reader of another kind keeps the Add.
    """
    graph = model.graph
    count, near = 0, []
    for norm in [found for node in list(graph) if (found := _norm(node)) is not None]:
        output = norm.add.outputs[0]
        if norm.name not in statistics:  # what products read was observed itself, with its moment
            statistics[norm.name] = affine(statistics[f"{norm.name}{NORMALIZED}"], norm.gain, norm.bias)
        statistics[str(norm.gained.name)] = affine(statistics[norm.name], 1.0, -norm.bias)
        for use in tuple(output.uses()):
            if _fold_into(graph, norm, use.node, use.idx, statistics):
                count += 1
            else:
                near.append(f"{norm.name}: {use.node.name} ({use.node.op_type}) cannot take its bias")
    return Rewrites(count, tuple(near))


def _norm(node: ir.Node) -> _Norm | None:
    gained = made_by(node.inputs[0], "Mul") if node.op_type == "Add" else None
    if gained is None or not roles.has(gained, Role.NORM_GAIN):
        return None
    gain, bias, normalized = constant(gained.inputs[1]), constant(node.inputs[1]), gained.inputs[0]
    if gain is None or bias is None or normalized is None:
        return None
    name = str(gained.name).removesuffix(GAINED)
    return _Norm(name, normalized, gained.outputs[0], gain, bias, node)


def _fold_into(graph: ir.Graph, norm: _Norm, reader: ir.Node, position: int, statistics: Observed) -> bool:
    """Move the bias into one reader, or tell that it takes none."""
    if reader.op_type == "Mul":
        return _fold_into_scaled(graph, norm, reader, statistics)
    if reader.op_type == "MatMul" and position == 0:
        if not shift_input(graph, reader, norm.bias):
            return False
        reader.replace_input_with(0, norm.gained)
        return True
    if roles.has(reader, Role.POOLING):
        return _fold_behind_pooling(graph, norm, reader, statistics)
    return reader.op_type == "Add" and _fold_into_sum(graph, norm, reader, position, statistics)


def _fold_into_scaled(graph: ir.Graph, norm: _Norm, scaled: ir.Node, statistics: Observed) -> bool:
    factor = constant(scaled.inputs[1])
    products = readers(scaled.outputs[0])
    if factor is None or not products or any(node.op_type != "MatMul" for node in products):
        return False
    if any(bias_add(node) is None for node in products):
        return False
    for node in products:
        shift_input(graph, node, norm.bias * factor)
    name = str(scaled.outputs[0].name)
    scaled.replace_input_with(0, norm.normalized)
    scaled.replace_input_with(1, add_constant(graph, f"{name}/gain", (norm.gain * factor).astype(np.float32)))
    statistics[name] = affine(statistics[name], 1.0, -norm.bias * factor)
    return True


def _fold_behind_pooling(graph: ir.Graph, norm: _Norm, pooling: ir.Node, statistics: Observed) -> bool:
    pooled = pooling.outputs[0]
    pooling.replace_input_with(1, norm.gained)
    bias = add_constant(graph, f"{pooling.name}/bias", norm.bias)
    total = add_node(readers(pooled)[0], "Add", [pooled, bias], f"{pooling.name}/total", like=pooled)
    insert_after(pooled, total)
    seen = statistics[str(pooled.name)]
    statistics[str(total.name)] = seen
    statistics[str(pooled.name)] = affine(seen, 1.0, -norm.bias)
    return True


def _fold_into_sum(graph: ir.Graph, norm: _Norm, add: ir.Node, position: int, statistics: Observed) -> bool:
    """Let the other operand of a residual sum take the whole bias: the product that makes it has one."""
    other = required(add.inputs[1 - position])
    end = biased_end(other)
    if end is None:
        return False
    add_to_bias(graph, end, norm.bias.astype(np.float64))
    for value in {end.outputs[0], other}:  # the product, and its sum with an outlier branch
        statistics[str(value.name)] = affine(statistics[str(value.name)], 1.0, norm.bias)
    add.replace_input_with(position, norm.gained)
    return True
