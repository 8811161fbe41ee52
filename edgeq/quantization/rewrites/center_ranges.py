"""Centre each channel of what 8-bit products read and even their ranges out (Outlier Suppression+), exact in FP32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph import roles
from edgeq.graph.edit import (
    Rewrites,
    add_constant,
    add_node,
    constant,
    is_read_once,
    made_by,
    readers,
    replace_constant,
    required,
)
from edgeq.graph.linear import Linear, Site, sites, value_projection
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.affine_statistics import affine
from edgeq.quantization.rewrites.product_bias import add_to_bias, bias_add, biased_end, shift_input
from edgeq.records import Scheme

RESTORED = "/restored"  # ends the name of a LayerNormalization's output as the residual stream adds it
EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of a channel's range: how much of it moves into weights
LEAST_RANGE = 0.1  # of the median: a channel that hardly moves on the calibration texts may move on others
COMPENSATED = 0.5  # of the error of weights rounded to nearest is left when they are rounded with compensation (GPTQ)
BEYOND = 0.5  # of the way from what contexts reached to what the values reach: a text of one word comes near the latter
_DEVIATIONS = 6.0  # between the middle of a channel's range and its end, where no second moment was observed

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class _Norm:
    """Hold a LayerNormalization that products read, behind a Mul of SmoothQuant's factors where there is one.

    Attributes:
        node: the LayerNormalization, with gain and bias.
        factor: float64[channels], of the Mul; ones where there is none.
        branches: the first products of outlier branches, which read the norm itself.
        sums: the Adds of the residual stream that read the norm, each with the Add of the bias of what it adds.
    """

    node: ir.Node
    factor: Vector
    branches: tuple[ir.Node, ...]
    sums: tuple[tuple[ir.Node, ir.Node], ...]


def center_ranges(model: ir.Model, statistics: Observed, scheme: Scheme) -> Rewrites:
    """Shift each channel of a LayerNormalization's output or of attention's context to the middle of its range.

    The channels are scaled anew, too, by a power of their ranges. Both cost nothing: the norm's gain and bias, or the
    weights of the values, take them in, and so do weights and biases of the products. A channel with values from 2 to
    6 takes as much of an 8-bit range as one from -6 to 6, and centred a third of it.

    Before::

        LayerNormalization(g, b) ─┬─ Mul(f) ─ MatMul(W) ─ Add(d)
                                  └─ Add(MatMul(U) ─ Add(e))

    After, with m the middles and k the factors::

        LayerNormalization(g f k, b f k - m) ─┬─ MatMul(W / k) ─ Add(d + m W / k)
                                              └─ Mul(1 / f k) ─ Add(MatMul(U) ─ Add(e + m / f k))

    Args:
        model: edited in place.
        statistics: of the tensors that products read; edited in place.
        scheme: the bits of tensors and weights.

    Source: Wei et al. 2023, Outlier Suppression+, section 4.1 (channel-wise shifting and scaling).
    """
    graph = model.graph
    count, near = 0, []
    for site in list(sites(graph)):
        seen = statistics.get(site.name)
        if seen is None or len(seen.minimum) != len(site.weights()[0]):
            continue
        norm = _norm(site)
        values = _values(site) if norm is None else None
        if norm is None and values is None:
            near.append(f"{site.name}: no LayerNormalization or values of attention can take in a shift")
            continue
        has_biases = all(bias_add(node) is not None for node in site.products)
        reached = seen if values is None else _toward(seen, statistics.get(str(values.output.name)))
        factor, shift = _best(reached, site.weights(), scheme, has_shift=has_biases)
        for node in site.products:
            if has_biases:
                shift_input(graph, node, shift / factor)
            replace_constant(graph, node, 1, required(constant(node.inputs[1])) / factor[:, None])
        moved = affine(seen, factor, -shift)
        if norm is not None:
            statistics[_into_norm(graph, site, norm, factor, shift)] = moved
        elif values is not None:
            replace_constant(graph, values.product, 1, values.weight * factor)
            replace_constant(graph, values.end, values.bias_position, values.bias * factor - shift)
            statistics[site.name] = moved
        count += 1
    return Rewrites(count, tuple(near))


def _norm(site: Site) -> _Norm | None:
    """Find the LayerNormalization that a site's products read, if all that reads it can take in a shift."""
    made = site.tensor.producer()
    factor: NDArray[np.floating] | None = None
    source = site.tensor
    if made is not None and roles.has(made, Role.SMOOTHED):
        factor, source = constant(made.inputs[1]), required(made.inputs[0])
        if factor is None or set(readers(site.tensor)) != set(site.products):
            return None
    node = made_by(source, "LayerNormalization")
    if node is None or source.is_graph_output() or site.tensor.is_graph_output() or len(node.outputs) > 1:
        return None
    if len(node.inputs) < 3 or constant(node.inputs[1]) is None or constant(node.inputs[2]) is None:
        return None
    own = set(site.products) | ({made} if factor is not None and made is not None else set())
    others = [reader for reader in dict.fromkeys(readers(source)) if reader not in own]
    branches = tuple(reader for reader in others if reader.op_type == "MatMul" and bias_add(reader) is not None)
    if any(not roles.has(reader, Role.OUTLIER_BRANCH) or reader.inputs[0] is not source for reader in branches):
        return None
    sums = [(reader, end) for reader in others if (end := _other_end(reader, source)) is not None]
    if len(branches) + len(sums) != len(others) or (sums and factor is None):
        return None
    ones = np.ones(len(required(constant(node.inputs[1]))))
    return _Norm(node, ones if factor is None else factor.astype(np.float64) * ones, branches, tuple(sums))


def _other_end(add: ir.Node, source: ir.Value) -> ir.Node | None:
    """Find the Add of the bias of what a residual sum adds to a tensor."""
    if add.op_type != "Add" or add.inputs[0] is add.inputs[1]:
        return None
    return biased_end(next(value for value in add.inputs if value is not source))


def _values(site: Site) -> Linear | None:
    """Find the projection of the values that attention's probabilities, which add up to one, mix into a context."""
    values = value_projection(site)
    if values is None or values.weight.shape[1] != len(site.weights()[0]) or not is_read_once(values.output):
        return None
    if set(readers(site.tensor)) != set(site.products) or site.tensor.is_graph_output():
        return None
    mixed = site.tensor
    while (step := made_by(mixed, "Reshape", "Transpose")) is not None:
        mixed = required(step.inputs[0])
    product = made_by(mixed, "MatMul")
    return values if product is not None and made_by(product.inputs[0], "Softmax") is not None else None


def _into_norm(graph: ir.Graph, site: Site, norm: _Norm, factor: Vector, shift: Vector) -> str:
    """Let a LayerNormalization scale and shift its output, and what adds that output undo it; give its name."""
    node, output = norm.node, norm.node.outputs[0]
    whole = norm.factor * factor
    restoring = np.divide(1.0, whole)
    for product in norm.branches:
        weight = required(constant(product.inputs[1]))
        shift_input(graph, product, restoring * shift)
        replace_constant(graph, product, 1, weight * restoring[:, None])
    if norm.sums:
        adds = [add for add, _ in norm.sums]
        first = next(each for each in graph if each in set(adds))
        scale = add_constant(graph, f"{output.name}{RESTORED}/factor", restoring.astype(np.float32))
        restored = add_node(first, "Mul", [output, scale], f"{output.name}{RESTORED}", like=output)
        for add, end in norm.sums:
            add.replace_input_with(next(i for i, value in enumerate(add.inputs) if value is output), restored)
            add_to_bias(graph, end, restoring * shift)
    for product in site.products:
        product.replace_input_with(0, output)
    replace_constant(graph, node, 1, required(constant(node.inputs[1])) * whole)
    replace_constant(graph, node, 2, required(constant(node.inputs[2])) * whole - shift)
    return str(output.name)


def _toward(context: Statistics, values: Statistics | None) -> Statistics:
    """Widen the ranges of contexts toward those of the values: no mean of values lies outside of these.

    Attention mixes the values of many tokens, so contexts of most texts lie close together, and channels scaled to no
    more than that would saturate where a text repeats one word.
    """
    if values is None or len(values.minimum) != len(context.minimum):
        return context
    low, high = np.minimum(values.minimum, context.minimum), np.maximum(values.maximum, context.maximum)
    return replace(
        context,
        minimum=context.minimum + BEYOND * (low - context.minimum),
        maximum=context.maximum + BEYOND * (high - context.maximum),
    )


def _best(
    seen: Statistics, weights: Sequence[NDArray[np.float32]], scheme: Scheme, has_shift: bool
) -> tuple[Vector, Vector]:
    """Choose the factors whose codes are predicted to give the least error at the products, and the shifts behind."""
    low, high = seen.minimum.astype(np.float64), seen.maximum.astype(np.float64)
    middle = (low + high) / 2.0 if has_shift else np.zeros(len(low))
    reach = np.maximum(high - middle, middle - low)
    reach = np.maximum(reach, LEAST_RANGE * max(float(np.median(reach)), 1e-9))
    even = np.exp(np.mean(np.log(reach)))
    choices = [(even / reach) ** exponent for exponent in EXPONENTS]
    square = _squares(seen, reach)
    stacked = np.concatenate(weights, axis=1).astype(np.float64)
    errors = [_error(low - middle, high - middle, square, stacked, factor, scheme) for factor in choices]
    factor = choices[int(np.argmin(errors))]
    return factor, middle * factor


def _squares(seen: Statistics, reach: Vector) -> Vector:
    """Give each channel's variance, float64[channels]."""
    if seen.moment is None or seen.mean is None:
        return (reach / _DEVIATIONS) ** 2
    return np.maximum(np.diag(seen.moment).astype(np.float64) - seen.mean.astype(np.float64) ** 2, 0.0)


def _error(low: Vector, high: Vector, square: Vector, weight: Vector, factor: Vector, scheme: Scheme) -> float:
    """Predict the squared error at the products' outputs, of the tensor's codes and of the weights' together.

    Rounding to a step s has a variance of s^2 / 12 in each channel, which its row of the weight passes on.
    """
    scaled = weight / factor[:, None]
    step = ((high * factor).max() - (low * factor).min()) / (2**scheme.activation_bits - 1)
    steps = np.abs(scaled).max(axis=0) / (2 ** (scheme.weight_bits - 1) - 1)
    of_weights = COMPENSATED * float((steps**2).sum()) * float((square * factor**2).sum())
    return float(step**2 * (scaled**2).sum() + of_weights)
