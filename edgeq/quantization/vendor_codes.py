"""Write the int8 codes of a vendor's compiler as QuantizeLinear and DequantizeLinear, to rank products in ONNX Runtime.

No artifact is made from this model: the compiler finds its own ranges. It shows which products lose most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Statistics
from edgeq.graph.edit import checked, constant
from edgeq.graph.linear import Linear, sites
from edgeq.quantization import affine, weight_rounding
from edgeq.quantization.qdq import LOWEST_IR_VERSION, UnsignedQdqBuilder, int8_weight

_BITS = 8


def coded(model: onnx.ModelProto, observed: Mapping[str, Statistics], products: Collection[str]) -> onnx.ModelProto:
    """Let products read and give 8 bits, with one range for each tensor and int8 weights rounded to nearest.

    What a Gather looks up in a table has 8 bits, too, with the table's range.

    Before::

        x ─ MatMul(W) ─ Add(b) ─

    After::

        x ─ Q ─ DQ ─ MatMul(DQ(int8 W)) ─ Add(b) ─ Q ─ DQ ─

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of what the products read and give.
        products: names of the MatMul nodes that the compiler makes integer.

    Raises:
        EdgeqError: a tensor has no statistics.
    """
    graph_model = ir.from_proto(model)
    builder = UnsignedQdqBuilder(graph_model.graph, dict(observed))
    for site in list(sites(graph_model.graph)):
        chosen = [node for node in site.products if node.name in products]
        if not chosen:
            continue
        read = builder.quantize(chosen[0], site.tensor, _range(builder, site.tensor), _BITS, f"{site.name}/read")
        for node in chosen:
            linear, weight = Linear.of(node), constant(node.inputs[1])
            if linear is None or weight is None:
                continue
            values, scales = weight_rounding.nearest(weight, _BITS)
            node.replace_input_with(0, read.value)
            node.replace_input_with(1, int8_weight(node, f"{node.name}/weight", values, scales, axis=1))
            _code_output(builder, linear.end, _range(builder, linear.output))
    for node in list(graph_model.graph):
        table = constant(node.inputs[0]) if node.op_type == "Gather" else None
        if table is not None and table.dtype == np.float32 and table.ndim == 2:
            _code_output(builder, node, affine.asymmetric(float(table.min()), float(table.max()), _BITS))
    graph_model.ir_version = LOWEST_IR_VERSION
    return checked(graph_model)


def _code_output(builder: UnsignedQdqBuilder, end: ir.Node, params: affine.Affine) -> None:
    """Let every reader of a node's result read its codes."""
    output = end.outputs[0]
    readers = tuple(output.uses())
    given = builder.pair(end, output, f"{output.name}/given", params, _BITS)
    for use in readers:
        use.node.replace_input_with(use.idx, given)


def _range(builder: UnsignedQdqBuilder, value: ir.Value) -> affine.Affine:
    seen = builder.statistics(value)
    return affine.asymmetric(float(seen.minimum.min()), float(seen.maximum.max()), _BITS)
