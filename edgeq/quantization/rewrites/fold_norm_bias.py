"""Fold constants of the integer-only form into weights: LayerNorm biases, and scale of outputs that the residual takes.

Every rewrite is exact in FP32. The statistics of the tensors it changes follow exactly from those observed, because
each shift and factor is per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, constant, is_read_once, made_by, readers
from edgeq.graph.linear import Site, bias_of, sites, value_sum
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.decompose_norms import GAINED, NORMALIZED

WIDENED = "/widened"


@dataclass(frozen=True)
class _Norm:
    """Hold the end of a LayerNormalization that was taken apart."""

    name: str
    normalized: ir.Value
    gained: ir.Value
    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    add: ir.Node


def fold_norm_biases(graph: ir.Graph, observed: Observed) -> int:
    """Move LayerNorm's bias into the biases of what reads it; give how many readers were served.

    A product takes `bias @ W`; the residual's other branch takes it whole; pooling takes it behind itself. Scaled
    copies are made straight from the normalised tensor. A reader of another kind keeps the Add.
    """
    count = 0
    for norm in [found for node in list(graph) if (found := _norm(node)) is not None]:
        output = norm.add.outputs[0]
        if norm.name not in observed:  # what products read was observed itself, with its moment
            observed[norm.name] = _affine(observed[f"{norm.name}{NORMALIZED}"], norm.gain, norm.bias)
        observed[str(norm.gained.name)] = _affine(observed[norm.name], 1.0, -norm.bias)
        for use in tuple(output.uses()):
            count += _serve(graph, norm, use.node, use.idx, observed)
    return count


def serve_gains(graph: ir.Graph, observed: Observed) -> int:
    """Let scaled copies of a normalisation without bias be made straight from the normalised tensor; give how many.

    Before::

        normalized ─ Mul(gain) ─┬─ Mul(factor) ─ MatMul
                                └─ residual

    After::

        normalized ─┬─ Mul(gain factor) ─ MatMul
                    └─ Mul(gain) ─ residual
    """
    count = 0
    for node in list(graph):
        gain = constant(node.inputs[1]) if roles.has(node, Role.NORM_GAIN) else None
        normalized, output = node.inputs[0], node.outputs[0]
        has_bias = any(roles.has(reader, Role.NORM_BIAS) for reader in readers(output))
        if gain is None or normalized is None or has_bias:
            continue  # with a bias, which `fold_norm_biases` serves
        if str(output.name) not in observed:
            observed[str(output.name)] = _affine(observed[str(normalized.name)], gain, 0.0)
        for use in tuple(output.uses()):
            factor = constant(use.node.inputs[1]) if use.node.op_type == "Mul" and use.idx == 0 else None
            if factor is None or any(each.op_type != "MatMul" for each in readers(use.node.outputs[0])):
                continue
            name = f"{use.node.outputs[0].name}/gain"
            use.node.replace_input_with(0, normalized)
            use.node.replace_input_with(1, add_constant(graph, name, (gain * factor).astype(np.float32)))
            count += 1
    return count


def _norm(node: ir.Node) -> _Norm | None:
    if node.op_type != "Add":
        return None
    gained = made_by(node.inputs[0], "Mul")
    if gained is None or not roles.has(gained, Role.NORM_GAIN):
        return None
    gain, bias, normalized = constant(gained.inputs[1]), constant(node.inputs[1]), gained.inputs[0]
    if gain is None or bias is None or normalized is None:
        return None
    name = str(gained.name).removesuffix(GAINED)
    return _Norm(name, normalized, gained.outputs[0], gain, bias, node)


def _serve(graph: ir.Graph, norm: _Norm, reader: ir.Node, position: int, observed: Observed) -> int:
    if reader.op_type == "Mul":
        return _serve_scaled(graph, norm, reader, observed)
    if reader.op_type == "MatMul" and position == 0:
        if not _shift_bias(graph, reader, norm.bias):
            return 0
        reader.replace_input_with(0, norm.gained)
        return 1
    if reader.op_type == "MatMul" and constant(reader.inputs[0]) is None:
        return _serve_pooling(graph, norm, reader, observed)
    if reader.op_type == "Add":
        other = reader.inputs[1 - position]
        end = _biased_end(other)
        if end is None:
            return 0
        _move_output(graph, end, norm.bias, other, observed)
        reader.replace_input_with(position, norm.gained)
        return 1
    return 0


def _serve_scaled(graph: ir.Graph, norm: _Norm, scaled: ir.Node, observed: Observed) -> int:
    factor = constant(scaled.inputs[1])
    products = readers(scaled.outputs[0])
    if factor is None or not products or any(node.op_type != "MatMul" for node in products):
        return 0
    if any(_bias_add(node) is None for node in products):
        return 0
    for node in products:
        _shift_bias(graph, node, norm.bias * factor)
    name = str(scaled.outputs[0].name)
    scaled.replace_input_with(0, norm.normalized)
    scaled.replace_input_with(1, add_constant(graph, f"{name}/gain", (norm.gain * factor).astype(np.float32)))
    observed[name] = _affine(observed[name], 1.0, -norm.bias * factor)
    return 1


def _serve_pooling(graph: ir.Graph, norm: _Norm, pooling: ir.Node, observed: Observed) -> int:
    """Pooling weights add up to one, so that the bias may be added behind."""
    if not roles.has(pooling, Role.POOLING):
        return 0
    pooled = pooling.outputs[0]
    pooling.replace_input_with(1, norm.gained)
    bias = add_constant(graph, f"{pooling.name}/bias", norm.bias)
    following = readers(pooled)[0]
    total = add_node(following, "Add", [pooled, bias], f"{pooling.name}/total")
    _alike(total, pooled)
    for use in tuple(pooled.uses()):
        if use.node is not total.producer():
            use.node.replace_input_with(use.idx, total)
    seen = observed[str(pooled.name)]
    observed[str(total.name)] = seen
    observed[str(pooled.name)] = _affine(seen, 1.0, -norm.bias)
    return 1


def _bias_add(product: ir.Node) -> ir.Node | None:
    """Give the Add of a constant that alone reads a product."""
    if not is_read_once(product.outputs[0]):
        return None
    add = readers(product.outputs[0])[0]
    return add if add.op_type == "Add" and bias_of(add) is not None else None


def _shift_bias(graph: ir.Graph, product: ir.Node, shift: NDArray[np.floating]) -> bool:
    """Add `shift @ W` to the bias behind a product: its output stays what it was."""
    add, weight = _bias_add(product), constant(product.inputs[1])
    if add is None or weight is None:
        return False
    _add_to_bias(graph, add, (shift.astype(np.float64) @ weight.astype(np.float64)))
    return True


def _add_to_bias(graph: ir.Graph, add: ir.Node, shift: NDArray[np.float64]) -> None:
    found = bias_of(add)
    if found is None:
        raise ValueError(f"{add.name} adds no constant")
    _replace(graph, add, found[0], found[1] + shift)


def _biased_end(value: ir.Value | None) -> ir.Node | None:
    """Find the Add of a product's bias that makes a value, looking through the sum with a side path."""
    add = made_by(value, "Add")
    if add is None or not is_read_once(add.outputs[0]):
        return None
    if bias_of(add) is not None:
        return add if made_by(add.inputs[1 - bias_of(add)[0]], "MatMul") is not None else None  # type: ignore[index]
    return next((end for operand in add.inputs if (end := _biased_end(operand)) is not None), None)


def _move_output(
    graph: ir.Graph, end: ir.Node, shift: NDArray[np.float32], other: ir.Value | None, observed: Observed
) -> None:
    """Shift the output of a product, and of the sum with a side path behind it."""
    _add_to_bias(graph, end, shift.astype(np.float64))
    for value in {end.outputs[0], other}:
        name = str(value.name)  # type: ignore[union-attr]
        observed[name] = _affine(observed[name], 1.0, shift)


def even_values(graph: ir.Graph, observed: Observed) -> int:
    """Centre each channel of what attention mixes on its mean, and bring all channels to one magnitude.

    Before::

        x ─ MatMul(Wv) ─ Add(bv) ─ mixed by attention ─ MatMul(Wo) ─ Add(bo)

    After::

        x ─ MatMul(Wv / f) ─ Add((bv - m) / f) ─ mixed by attention ─ MatMul(f Wo) ─ Add(bo + m Wo)

    Attention's weights add up to one, so that the mean passes through unchanged. An 8-bit
    softmax's add up to less where a long text spreads them thin: what is lost of a centred value is little.
    """
    count = 0
    for site in list(sites(graph)):
        add = value_sum(site)
        product = made_by(add.inputs[0], "MatMul") if add is not None else None
        found = bias_of(add) if add is not None else None
        weight = constant(product.inputs[1]) if product is not None else None
        if add is None or product is None or found is None or weight is None or not is_read_once(add.outputs[0]):
            continue
        name = str(add.outputs[0].name)
        seen = observed[name]
        if seen.mean is None or any(_bias_add(node) is None for node in site.products):
            continue
        mean = seen.mean.astype(np.float64)
        largest = np.maximum(np.maximum(mean - seen.minimum, seen.maximum - mean), 1e-6)
        factors = largest / np.exp(np.mean(np.log(largest)))
        for node in site.products:
            _shift_bias(graph, node, mean)
            _replace(graph, node, 1, constant(node.inputs[1]) * factors[:, None])
        _replace(graph, product, 1, weight / factors)
        _replace(graph, add, found[0], (found[1] - mean) / factors)
        observed[name] = _affine(seen, 1.0 / factors, -mean / factors)
        even = observed[site.name] = _affine(observed[site.name], 1.0 / factors, -mean / factors)
        mixed = _mixed(site)
        observed[str(mixed.name)] = Statistics(even.minimum.min(keepdims=True), even.maximum.max(keepdims=True))
        count += 1
    return count


def _mixed(site: Site) -> ir.Value:
    """Give the product of attention's weights and values that a context is."""
    value: ir.Value = site.tensor
    while (step := made_by(value, "Reshape", "Transpose")) is not None and step.inputs[0] is not None:
        value = step.inputs[0]
    return value


def _replace(graph: ir.Graph, node: ir.Node, position: int, array: NDArray[np.floating]) -> None:
    name = str(node.inputs[position].name)  # type: ignore[union-attr]
    node.replace_input_with(position, add_constant(graph, name, array.astype(np.float32)))


def widen_outputs(graph: ir.Graph, observed: Observed, quantile: float) -> int:
    """Scale down, in the weights, the output channels of products that the residual takes, and back up behind them.

    Before::

        x ─ MatMul(W) ─ Add(b) ─ residual

    After::

        x ─ MatMul(W / k) ─ Add(b / k) ─ Mul(k) ─ residual

    A few channels of the residual are a hundred times larger than the rest; in 8 bits they would leave the others a
    handful of codes. k is 1 up to the given quantile of the channels' magnitudes, and brings larger ones down to it.
    """
    count = 0
    for add in list(graph):
        found = bias_of(add) if add.op_type == "Add" else None
        product = made_by(add.inputs[1 - found[0]], "MatMul") if found is not None else None
        weight = constant(product.inputs[1]) if product is not None else None
        if found is None or product is None or weight is None or not is_read_once(add.outputs[0]):
            continue
        if readers(add.outputs[0])[0].op_type != "Add":
            continue
        name = str(add.outputs[0].name)
        seen = observed[name]
        largest = np.maximum(np.abs(seen.minimum), np.abs(seen.maximum)).astype(np.float64)
        factors = np.maximum(1.0, largest / max(float(np.quantile(largest, quantile)), 1e-12))
        _replace(graph, product, 1, weight / factors)
        _replace(graph, add, found[0], found[1] / factors)
        output, reader = add.outputs[0], readers(add.outputs[0])[0]
        factor = add_constant(graph, f"{name}/factor", factors.astype(np.float32))
        widened = add_node(reader, "Mul", [output, factor], f"{name}{WIDENED}")
        _alike(widened, output)
        reader.replace_input_with(next(i for i, value in enumerate(reader.inputs) if value is output), widened)
        observed[f"{name}{WIDENED}"] = seen
        observed[name] = _affine(seen, 1.0 / factors, 0.0)
        count += 1
    return count


def _alike(value: ir.Value, other: ir.Value) -> None:
    value.shape = other.shape
    if other.dtype is not None:
        value.dtype = other.dtype


def _affine(seen: Statistics, factor: NDArray[np.floating] | float, shift: NDArray[np.floating] | float) -> Statistics:
    """Give the statistics of `factor * x + shift`, both per channel: all of them follow exactly."""
    ends = seen.minimum * factor + shift, seen.maximum * factor + shift
    low, high = np.minimum(*ends).astype(np.float32), np.maximum(*ends).astype(np.float32)
    mean = None if seen.mean is None else np.asarray(seen.mean * factor, np.float64)
    moment = None
    if seen.moment is not None and mean is not None:
        factors, shifts = np.broadcast_to(factor, mean.shape), np.broadcast_to(shift, mean.shape)
        moment = seen.moment * np.outer(factors, factors) + np.outer(mean, shifts) + np.outer(shifts, mean + shifts)
        moment = moment.astype(np.float32)
    return Statistics(low, high, None, moment, None if mean is None else (mean + shift).astype(np.float32))
