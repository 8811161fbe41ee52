"""Scale down the outlier channels of products that the residual stream adds, and scale them back up behind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph.edit import Rewrites, add_constant, add_node, is_read_once, readers
from edgeq.graph.linear import Linear, bias_of
from edgeq.quantization.rewrites.affine_statistics import affine
from edgeq.quantization.rewrites.product_bias import put_constant

WIDENED = "/widened"


def scale_outputs(model: ir.Model, statistics: Observed, quantile: float) -> Rewrites:
    """Divide the output channels of residual products in their weights, and multiply them behind the 8-bit output.

    Before::

        x ─ MatMul(W) ─ Add(b) ─ residual

    After::

        x ─ MatMul(W / k) ─ Add(b / k) ─ Mul(k) ─ residual

    A few channels of the residual are a hundred times larger than the rest; in 8 bits they would leave the others a
    handful of steps. k is 1 up to the given quantile of the channels' magnitudes, and brings larger ones down to it.

    Args:
        model: edited in place.
        statistics: of the products' outputs; edited in place.
        quantile: of the channels' magnitudes, 0 to 1.
    """
    graph = model.graph
    count = 0
    for add in list(graph):
        linear = Linear.making(add.outputs[0]) if bias_of(add) is not None else None
        if linear is None or not is_read_once(linear.output):
            continue
        output = linear.output
        reader = readers(output)[0]
        if reader.op_type != "Add":
            continue
        name = str(output.name)
        seen = statistics[name]
        largest = seen.magnitudes
        factors = np.maximum(1.0, largest / max(float(np.quantile(largest, quantile)), 1e-12))
        put_constant(graph, linear.product, 1, linear.weight / factors)
        put_constant(graph, add, linear.bias_position, linear.bias / factors)
        factor = add_constant(graph, f"{name}/factor", factors.astype(np.float32))
        scaled = add_node(reader, "Mul", [output, factor], f"{name}{WIDENED}", like=output)
        reader.replace_input_with(next(i for i, value in enumerate(reader.inputs) if value is output), scaled)
        statistics[f"{name}{WIDENED}"] = seen
        statistics[name] = affine(seen, 1.0 / factors, 0.0)
        count += 1
    return Rewrites(count)
