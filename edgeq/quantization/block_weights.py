"""Quantise weights alone, in blocks of input channels: what runtimes know as weight-only int4 (MatMulNBits)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.graph.edit import add_constant, add_node, constant, infer_shapes, replace_uses
from edgeq.graph.linear import Linear, sites
from edgeq.quantization import weight_rounding
from edgeq.quantization.mixed import finished
from edgeq.quantization.qdq import Quantized, graph_of
from edgeq.quantization.walk import Refusal
from edgeq.records import Scheme, WeightsSpec

RUNTIME_DOMAIN = "com.microsoft"  # of GatherBlockQuantized, which ONNX Runtime and OpenVINO read
_UINT4 = ir.DataType.UINT4.numpy()
_TABLE_ROWS = 256  # of the smallest table in 4 bits


def rewrite_weights(model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme) -> onnx.ModelProto:
    """Give the equalised float model: this kind rewrites nothing."""
    return infer_shapes(ir.to_proto(ir.from_proto(model)))


def quantize_weights(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    refusals: list[Refusal] | None = None,
    feeds: Sequence[AnyFeeds] = (),
) -> Quantized:
    """Put DequantizeLinear in front of every token-level MatMul's weight, with a scale for each block of 32 channels.

    Before::

        x ─ MatMul(W) ─ Add(b)

    After::

        x ─ MatMul(DequantizeLinear(uint4 W, block_size 32)) ─ Add(b, and what rounding took from the mean)

    ONNX Runtime makes MatMulNBits of the two, and quantises x to int8 by blocks inside.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of every tensor that a weight product reads: moments and means.
        scheme: bits of weights and tables.
        refusals: this kind refuses nothing.
        feeds: this kind rewrites nothing that would be proved.

    Returns:
        The model, the names of the products with such weights, and those of weight products that stay float.
    """
    spec = scheme.spec
    if not isinstance(spec, WeightsSpec):
        raise TypeError(f"scheme {scheme.name} is of kind {spec.kind}")
    graph_model = ir.from_proto(model)
    graph = graph_model.graph
    made: list[str] = []
    for site in list(sites(graph)):
        seen = observed.get(site.name)
        for node in site.products:
            if node.name not in scheme.floats:
                _quantize_product(node, seen, scheme.weight_bits, spec.block)
                made.append(str(node.name))
    if scheme.embedding_bits == 4:
        for node in list(graph):
            _quantize_table(graph_model, node, spec.block)
    return finished(graph_model, made, scheme.model_copy(update={"embedding_bits": max(scheme.embedding_bits, 8)}))


def _quantize_product(node: ir.Node, seen: Statistics | None, bits: int, block: int) -> None:
    """Store a MatMul's weight in 4 bits, and add to its bias what rounding takes from the mean."""
    linear, weight, stored = Linear.of(node), constant(node.inputs[1]), node.inputs[1]
    if linear is None or weight is None or stored is None:
        raise ValueError(f"{node.name}: has no weight")
    found = weight_rounding.blocked(weight, seen, bits, block)
    if linear.add is not None and seen is not None and seen.mean is not None:
        lost = seen.mean.astype(np.float64) @ (weight.astype(np.float64) - found.real(block))
        bias = (linear.bias + lost).astype(np.float32)
        linear.add.replace_input_with(
            linear.bias_position, add_constant(graph_of(node), f"{node.name}/corrected_bias", bias)
        )
    graph, name = graph_of(node), str(stored.name)
    inputs = [
        add_constant(graph, f"{name}/codes", found.codes.astype(_UINT4)),
        add_constant(graph, f"{name}/scale", found.scales),
        add_constant(graph, f"{name}/zero_point", found.zero_points.astype(_UINT4)),
    ]
    real = add_node(node, "DequantizeLinear", inputs, f"{node.name}/weight", {"axis": 0, "block_size": block})
    node.replace_input_with(1, real)


def _quantize_table(model: ir.Model, node: ir.Node, block: int) -> None:
    """Let GatherBlockQuantized look up rows of 4-bit codes, which standard operators only dequantise as a whole.

    Before::

        Gather(table, input_ids)

    After::

        GatherBlockQuantized(uint4 table, input_ids, scales, zero points)
    """
    table = constant(node.inputs[0]) if node.op_type == "Gather" else None
    if table is None or table.dtype != np.float32 or table.ndim != 2 or len(table) < _TABLE_ROWS:
        return
    if table.shape[1] % (2 * block) or node.inputs[0] is None or node.inputs[1] is None:
        return
    found = weight_rounding.block_parameters(table.T, 4, block)
    graph, name, old = model.graph, str(node.inputs[0].name), node.outputs[0]
    inputs = [
        add_constant(graph, f"{name}/codes", _packed(found.codes.T)),
        node.inputs[1],
        add_constant(graph, f"{name}/scale", np.ascontiguousarray(found.scales.T)),
        add_constant(graph, f"{name}/zero_point", _packed(found.zero_points.T)),
    ]
    settings = {"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    rows = ir.node("GatherBlockQuantized", inputs, settings, domain=RUNTIME_DOMAIN, name=f"{node.name}/rows")
    rows.outputs[0].name, rows.outputs[0].shape = f"{old.name}/rows", old.shape
    rows.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(node, rows)
    replace_uses(old, rows.outputs[0])
    graph.remove(node, safe=True)
    model.opset_imports[RUNTIME_DOMAIN] = 1


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put two 4-bit codes into a byte, the first in the low half: uint8[rows, columns / 2]."""
    high: NDArray[np.uint8] = np.left_shift(codes[:, 1::2], np.uint8(4))
    return np.ascontiguousarray(codes[:, 0::2] | high)
