"""Turn an equalised float model into a QDQ model: decides from calibration and scheme, observes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError
from edgeq.graph.edit import add_constant, add_node, checked, constant, dims, replace_uses
from edgeq.graph.linear import Site, sites
from edgeq.quantization import affine, ranges, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.convolution import quantize_convolutions
from edgeq.quantization.htp.quantizer import quantize_htp
from edgeq.quantization.integer.quantizer import quantize_integer
from edgeq.quantization.qdq import LOWEST_IR_VERSION
from edgeq.quantization.vendor import vendor_form
from edgeq.records import Scheme


def quantize(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    compensate: bool = True,
    feeds: Sequence[AnyFeeds] = (),
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """Put QuantizeLinear and DequantizeLinear around every token-level weight product and the embedding tables.

    Convolutions get them, too: see `edgeq.quantization.convolution`.

    A scheme that leaves nothing float has more to do: see `edgeq.quantization.integer.quantizer` and
    `edgeq.quantization.htp.quantizer`; one that leaves the codes to a vendor's compiler has none: see
    `edgeq.quantization.vendor`.

    Before::

        x ─ MatMul(W) ─ Add(b)

    After::

        x ─ QuantizeLinear ─ DequantizeLinear ─ MatMul(DequantizeLinear(W codes)) ─ Add(b)

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of every tensor that a weight product reads.
        scheme: bits and signs.
        compensate: round weights with error compensation where a second moment was observed; else to nearest.
        feeds: probe batches on which each of the scheme's rewrites is proved in FP32; none for trials that repeat what
            was proved before.

    Returns:
        The QDQ model (opset 21, IR version 10), the names of the integer products, and those of weight products that
        stay float by the scheme.

    Raises:
        EdgeqError: a tensor has no statistics, or a rewrite changed the FP32 function.
    """
    if scheme.vendor is not None:
        return vendor_form(model, observed, scheme.vendor, scheme.raised, feeds)
    if scheme.htp is not None:
        return quantize_htp(model, observed, scheme, feeds)
    if scheme.integer is not None:
        return quantize_integer(model, observed, scheme, feeds)
    graph_model = ir.from_proto(model)
    graph = graph_model.graph
    integer: list[str] = []
    for site in list(sites(graph)):
        site = replace(site, products=tuple(node for node in site.products if node.name not in scheme.raised))
        if not site.products:
            continue
        if site.name not in observed:
            raise EdgeqError(f"{site.name}: read by a weight product, but the calibration has no statistics of it")
        integer.extend(_quantize_site(graph, site, observed[site.name], scheme, compensate))
    integer += quantize_convolutions(graph, observed, scheme)
    for node in list(graph):
        if node.op_type in ("Gather", "Slice"):
            _quantize_table(graph, node, scheme.embedding_bits)
    floats = tuple(
        str(node.name)
        for node in graph
        if node.op_type == "MatMul" and node.name not in integer and constant(node.inputs[1]) is not None
    )
    _drop_unused(graph)
    graph_model.ir_version = LOWEST_IR_VERSION
    return checked(graph_model), tuple(integer), floats


def _quantize_site(graph: ir.Graph, site: Site, statistics: Statistics, scheme: Scheme, compensate: bool) -> list[str]:
    low, high = ranges.choose(statistics, scheme)
    codes = affine.asymmetric(low, high, scheme.activation_bits, scheme.activations_signed)
    dequantized = _qdq(graph, site, codes, scheme)
    for node in site.products:
        weight = constant(node.inputs[1])
        if weight is None:
            continue
        if compensate and statistics.moment is not None:
            rounded, scales = weight_rounding.compensated(weight, statistics.moment, codes.scale, scheme.weight_bits)
        else:
            rounded, scales = weight_rounding.nearest(weight, scheme.weight_bits)
        name = str(node.inputs[1].name) if node.inputs[1] is not None else str(node.name)
        node.replace_input_with(0, dequantized)
        node.replace_input_with(1, _dequantized_constant(graph, node, name, rounded, scales, 1))
    return [str(node.name) for node in site.products]


def _qdq(graph: ir.Graph, site: Site, codes: Affine, scheme: Scheme) -> ir.Value:
    dtype = np.int8 if scheme.activations_signed else np.uint8
    scale = add_constant(graph, f"{site.name}/scale", np.array(codes.scale, np.float32))
    zero_point = add_constant(graph, f"{site.name}/zero_point", np.array(codes.zero_point, dtype))
    first = site.products[0]
    quantized = add_node(first, "QuantizeLinear", [site.tensor, scale, zero_point], f"{site.name}/quantized")
    return add_node(first, "DequantizeLinear", [quantized, scale, zero_point], f"{site.name}/dequantized")


def _dequantized_constant(
    graph: ir.Graph, before: ir.Node, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32], axis: int
) -> ir.Value:
    inputs = [
        add_constant(graph, f"{name}/codes", codes),
        add_constant(graph, f"{name}/scale", scales),
        add_constant(graph, f"{name}/zero_point", np.zeros(scales.shape, np.int8)),
    ]
    # Named after the product, because several products may share one weight.
    return add_node(before, "DequantizeLinear", inputs, f"{before.name}/weight", {"axis": axis})


def _quantize_table(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    """Look up codes and the scale of each row: a table dequantised before would be unpacked to FP32 at load time.

    Before::

        Gather(table, input_ids)

    After::

        Gather(codes, input_ids) ─ Cast ─┬─ Mul
        Gather(row scales, input_ids) ───┘

    A scale per row fits a table better than one per column, which the largest of all tokens decides.
    """
    table = constant(node.inputs[0])
    shape = dims(node.outputs[0])
    if table is None or table.dtype != np.float32 or table.ndim < 2 or shape is None or len(shape) != 3:
        return
    codes, scales = weight_rounding.nearest(table.reshape(-1, table.shape[-1]).T, bits)
    name = str(node.inputs[0].name)  # type: ignore[union-attr]
    code_table = add_constant(graph, f"{name}/codes", codes.T.reshape(table.shape))
    scale_table = add_constant(graph, f"{name}/scale", scales.reshape(*table.shape[:-1], 1))
    attributes = {key: item.value for key, item in node.attributes.items() if item.value is not None}
    stem, others = str(node.outputs[0].name), [value for value in node.inputs[1:] if value is not None]
    rows = add_node(node, node.op_type, [code_table, *others], f"{stem}/codes", attributes)
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
