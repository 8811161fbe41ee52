"""Quantise the MatMul, Conv and Gather of an equalised float model that have weights; the rest stays float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.graph.edit import add_constant, add_node, checked, constant, dims, infer_shapes, replace_uses
from edgeq.graph.linear import Linear, Site, sites
from edgeq.quantization import affine, promoted_products, ranges, weight_rounding
from edgeq.quantization.convolution import quantize_convolutions
from edgeq.quantization.qdq import HEADROOM, LOWEST_IR_VERSION, QdqBuilder, Quantized, UnsignedQdqBuilder, int8_weight
from edgeq.quantization.rewrites.mixed import mixed_form, mixed_passes
from edgeq.quantization.schemes import FLOAT_BITS
from edgeq.quantization.walk import Refusal
from edgeq.records import Scheme


def rewrite_mixed(model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme) -> onnx.ModelProto:
    """Give the float model whose tensors the QDQ model holds as integers."""
    return infer_shapes(ir.to_proto(mixed_form(model, observed, mixed_passes(scheme))[0]))


def quantize_mixed(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    refusals: list[Refusal] | None = None,
    feeds: Sequence[AnyFeeds] = (),
    compensate: bool = True,
    has_tables: bool = True,
) -> Quantized:
    """Put QuantizeLinear and DequantizeLinear around every token-level weight product and the embedding tables.

    Convolutions get them, too: see `edgeq.quantization.convolution`.

    Before::

        x ─ MatMul(W) ─ Add(b)

    After::

        x ─ QuantizeLinear ─ DequantizeLinear ─ MatMul(DequantizeLinear(int8 W)) ─ Add(b)

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of every tensor that a weight product reads.
        scheme: bits and signs.
        refusals: where refusals are collected; missing statistics are made up then. This kind refuses nothing.
        feeds: probe batches on which the rewrites are proved; none where the same was proved before.
        compensate: round weights with error compensation (GPTQ) where a second moment was observed; else to nearest.
        has_tables: quantise the tables of embeddings, too; trials that differ in the products alone need not.

    Returns:
        The QDQ model (opset 21, IR version 10), the names of the integer products, and those of weight products that
        stay float by the scheme.

    Raises:
        EdgeqError: a tensor has no statistics, or a rewrite changed the FP32 function.
    """
    graph_model, statistics = mixed_form(model, observed, mixed_passes(scheme), feeds)
    graph = graph_model.graph
    kind = QdqBuilder if scheme.activations_signed else UnsignedQdqBuilder
    builder = kind(graph, statistics, has_placeholders=refusals is not None)
    integer: list[str] = []
    for site in list(sites(graph)):
        integer.extend(_quantize_site(builder, site, scheme, compensate))
    integer += quantize_convolutions(builder, scheme)
    return finished(graph_model, integer, scheme, has_tables)


def finished(model: ir.Model, integer: Sequence[str], scheme: Scheme, has_tables: bool = True) -> Quantized:
    """Quantise the embedding tables of a model whose products are quantised, and drop the float weights.

    Args:
        model: edited in place.
        integer: the names of its integer products.
        scheme: bits of tables.
        has_tables: quantise them; else they stay float.
    """
    has_tables = has_tables and scheme.embedding_bits != FLOAT_BITS
    for node in list(model.graph):
        if has_tables and node.op_type in ("Gather", "Slice"):
            _quantize_table(model.graph, node, scheme.embedding_bits)
    floats = tuple(
        str(node.name)
        for node in model.graph
        if node.op_type == "MatMul" and node.name not in integer and constant(node.inputs[1]) is not None
    )
    _drop_unused(model.graph)
    model.ir_version = LOWEST_IR_VERSION
    return Quantized(checked(model), tuple(integer), floats)


def _quantize_site(builder: QdqBuilder, site: Site, scheme: Scheme, compensate: bool) -> list[str]:
    """Quantise a tensor once and the weight of each MatMul that reads it and does not stay float."""
    site = replace(site, products=tuple(node for node in site.products if node.name not in scheme.floats))
    if not site.products:
        return []
    statistics = builder.statistics(site.tensor)
    low, high = ranges.choose(statistics, scheme)
    is_promoted = all(node.name in scheme.promoted for node in site.products)
    room = HEADROOM if is_promoted else 1.0  # as 16-bit codes have it
    params = affine.asymmetric(low * room, high * room, scheme.activation_bits, scheme.activations_signed)
    read = builder.quantize(site.products[0], site.tensor, params, scheme.activation_bits, site.name)
    rest = None
    made: list[str] = []
    for node in site.products:
        weight = constant(node.inputs[1])
        if weight is None or node.inputs[1] is None:
            continue
        linear = Linear.of(node)
        seen = statistics if compensate else None
        values, scales = weight_rounding.rounded(weight, seen, params.scale, scheme.weight_bits)
        node.replace_input_with(0, read.value)
        node.replace_input_with(1, int8_weight(node, str(node.inputs[1].name), values, scales, axis=1))
        made.append(str(node.name))
        if node.name in scheme.promoted and linear is not None:
            rest = rest or promoted_products.rest(builder, site, read)
            made.append(promoted_products.add_rest(node, linear.end, rest))
    return made


def _quantize_table(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    """Let a Gather give int8 rows, and another their scales: a table dequantised before would be FP32 in memory.

    Before::

        Gather(table, input_ids)

    After::

        Gather(int8 table, input_ids) ─ Cast ─┬─ Mul
        Gather(row scales, input_ids) ────────┘

    A scale per row fits a table better than one per column, which the largest of all tokens decides.
    """
    table = constant(node.inputs[0])
    shape = dims(node.outputs[0])
    if table is None or table.dtype != np.float32 or table.ndim < 2 or shape is None or len(shape) != 3:
        return
    values, scales = weight_rounding.nearest(table.reshape(-1, table.shape[-1]).T, bits)
    name = str(node.inputs[0].name)  # type: ignore[union-attr]
    integer_table = add_constant(graph, f"{name}/codes", values.T.reshape(table.shape))
    scale_table = add_constant(graph, f"{name}/scale", scales.reshape(*table.shape[:-1], 1))
    attributes = {key: item.value for key, item in node.attributes.items() if item.value is not None}
    stem, others = str(node.outputs[0].name), [value for value in node.inputs[1:] if value is not None]
    rows = add_node(node, node.op_type, [integer_table, *others], f"{stem}/codes", attributes)
    rows.shape, rows.dtype = node.outputs[0].shape, ir.DataType.INT8
    steps = add_node(node, node.op_type, [scale_table, *others], f"{stem}/scales", attributes)
    numbers = add_node(node, "Cast", [rows], f"{stem}/numbers", {"to": ir.DataType.FLOAT.value})
    numbers.shape, numbers.dtype = node.outputs[0].shape, ir.DataType.FLOAT
    real = add_node(node, "Mul", [numbers, steps], f"{stem}/rows")
    real.shape, real.dtype = node.outputs[0].shape, ir.DataType.FLOAT
    replace_uses(node.outputs[0], real)
    graph.remove(node, safe=True)


def _drop_unused(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
