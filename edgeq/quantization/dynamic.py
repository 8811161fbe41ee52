"""Quantise weight products with an activation scale for each token, found while the model runs (dynamic int8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.graph.edit import add_constant, add_node, add_node_after, constant, infer_shapes, insert_after, required
from edgeq.graph.linear import Linear, Site, sites
from edgeq.graph.roles import Role
from edgeq.quantization import affine, promoted_products, ranges, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.convolution import quantize_convolutions
from edgeq.quantization.mixed import finished
from edgeq.quantization.qdq import Quantized, QuantizedValue, UnsignedQdqBuilder, int8_weight
from edgeq.quantization.rewrites.mixed import dynamic_passes, mixed_form
from edgeq.quantization.walk import Refusal
from edgeq.records import Scheme

_CENTRED = 128  # zero point of a tensor that reaches as far down as up
_LOW = 32  # of one that hardly goes below zero, as GELU's: an eighth of the codes
_LOW_SHARE = 0.125  # of the range observed: below it the second zero point holds all that is negative
_LEAST = 1e-30  # that a token is divided by: one of zeros alone stays zero
_TYPICAL = 0.5  # a token's step over that of the range of all texts: weights are rounded for its noise


def rewrite_dynamic(model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme) -> onnx.ModelProto:
    """Give the float model whose tensors the QDQ model holds as integers."""
    return infer_shapes(ir.to_proto(mixed_form(model, observed, dynamic_passes(scheme))[0]))


def quantize_dynamic(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    refusals: list[Refusal] | None = None,
    feeds: Sequence[AnyFeeds] = (),
) -> Quantized:
    """Divide each token by its largest value in front of QuantizeLinear, and multiply what a product gives by it again.

    No range of an activation is stored, so none can be exceeded, and a token's codes depend on no other token.

    Before::

        x ─ MatMul(W) ─ Add(b)

    After::

        x ─┬─ Abs ─ ReduceMax ─┬────────────────────────────────────────────────────────────────────┐
           └────────────────── Div ─ QuantizeLinear ─ DequantizeLinear ─ MatMul(DequantizeLinear(W)) ─ Mul ─ Add(b)

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of every tensor that a weight product reads: for second moments, from which weights are
            rounded, for the rewrites, and for the zero point of what hardly goes below zero.
        scheme: bits. Convolutions have a static range.
        refusals: where refusals are collected; missing statistics are made up then. This kind refuses nothing.
        feeds: probe batches on which the rewrites are proved; none where the same was proved before.

    Returns:
        The QDQ model, the names of the integer products, and those of weight products that stay float by the scheme.

    Raises:
        EdgeqError: a tensor has no statistics, or a rewrite changed the FP32 function.
    """
    graph_model, statistics = mixed_form(model, observed, dynamic_passes(scheme), feeds)
    graph = graph_model.graph
    builder = UnsignedQdqBuilder(graph, statistics, has_placeholders=refusals is not None)
    integer: list[str] = []
    for site in list(sites(graph)):
        integer.extend(_quantize_site(builder, site, scheme))
    integer += quantize_convolutions(builder, scheme)
    return finished(graph_model, integer, scheme)


def _quantize_site(builder: UnsignedQdqBuilder, site: Site, scheme: Scheme) -> list[str]:
    """Scale and quantise a tensor once, and the weight of each MatMul that reads it and does not stay float."""
    site = replace(site, products=tuple(node for node in site.products if node.name not in scheme.floats))
    if not site.products:
        return []
    statistics = builder.statistics(site.tensor)
    low, high = ranges.choose(statistics, scheme)
    zero_point = _LOW if -low < _LOW_SHARE * (high - low) else _CENTRED
    largest, scaled = _scaled(builder.graph, site, zero_point)
    params = Affine(1.0 / _above(zero_point), zero_point, 0, 255)
    read = builder.quantize(site.products[0], scaled, params, scheme.activation_bits, site.name)
    step = _TYPICAL * affine.asymmetric(low, high, scheme.activation_bits, signed=False).scale
    rest: QuantizedValue | None = None
    made: list[str] = []
    for node in site.products:
        weight, linear = constant(node.inputs[1]), Linear.of(node)
        if weight is None or node.inputs[1] is None or linear is None:
            continue
        values, scales = weight_rounding.rounded(weight, statistics, step, scheme.weight_bits)
        node.replace_input_with(0, read.value)
        node.replace_input_with(1, int8_weight(node, str(node.inputs[1].name), values, scales, axis=1))
        made.append(str(node.name))
        _scale_back(node, largest)
        if node.name in scheme.promoted:
            rest = rest or promoted_products.rest(builder, replace(site, tensor=scaled), read)
            made.append(promoted_products.add_rest(node, node, rest))
    return made


def _scaled(graph: ir.Graph, site: Site, zero_point: int) -> tuple[ir.Value, ir.Value]:
    """Divide each token by the largest of its values, so that codes hold all; give the divisor and the quotient."""
    before, name, tensor = site.products[0], site.name, site.tensor
    axes = graph.initializers.get("last_axis") or add_constant(graph, "last_axis", np.array([-1], np.int64))
    least = graph.initializers.get("least") or add_constant(graph, "least", np.array(_LEAST, np.float32))
    keeps = {"keepdims": 1}
    if zero_point == _CENTRED:
        sizes = add_node(before, "Abs", [tensor], f"{name}/size")
        ends = [add_node(before, "ReduceMax", [sizes, axes], f"{name}/highest", keeps)]
    else:
        low = add_node(before, "ReduceMin", [tensor, axes], f"{name}/lowest", keeps)
        share = add_constant(graph, f"{name}/share", np.array(-_above(zero_point) / zero_point, np.float32))
        high = add_node(before, "ReduceMax", [tensor, axes], f"{name}/highest", keeps)
        ends = [high, add_node(before, "Mul", [low, share], f"{name}/lowest_as_high")]
    largest = add_node(before, "Max", [*ends, least], f"{name}/largest")
    scaled = add_node(before, "Div", [tensor, largest], f"{name}/scaled", role=Role.TOKEN_SCALED, like=tensor)
    return largest, scaled


def _scale_back(product: ir.Node, largest: ir.Value) -> None:
    """Multiply what a product gives by each token's divisor, in front of the bias; the result keeps its name."""
    output = product.outputs[0]
    real = add_node_after(product, "Mul", [output, largest], f"{product.name}/scaled_back")
    output.name, real.name = f"{output.name}/of_codes", output.name
    real.shape, real.dtype = output.shape, required(output.dtype)
    insert_after(output, real)


def _above(zero_point: int) -> int:
    """Count the codes above the zero point that are used: as many as below, where it is in the middle."""
    return 127 if zero_point == _CENTRED else 255 - zero_point
