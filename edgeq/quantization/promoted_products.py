"""Give an 8-bit MatMul the precision of a 16-bit input: a second 8-bit MatMul multiplies what the first rounds away."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import add_node, add_node_after, insert_after
from edgeq.graph.linear import Site
from edgeq.quantization import affine
from edgeq.quantization.qdq import QdqBuilder, QuantizedValue

REST = "/rest"  # behind the name of a product: of the second one
_STEPS = 16.0  # of the first codes, which the second ones cover: one for rounding, the others for values past the range


def rest(builder: QdqBuilder, site: Site, read: QuantizedValue) -> QuantizedValue:
    """Quantise what a tensor's 8-bit codes round away, in front of the first product.

    Args:
        builder: of the graph.
        site: the tensor and its products.
        read: the tensor with its codes.

    Returns:
        The rest, in steps 16 times as fine.
    """
    half = _STEPS / 2.0 * read.params.scale
    is_signed = read.params.low < 0
    params = affine.asymmetric(-half, half, read.bits, is_signed)
    lost = add_node(site.products[0], "Sub", [site.tensor, read.value], f"{site.name}{REST}", like=site.tensor)
    return builder.quantize(site.products[0], lost, params, read.bits, f"{site.name}{REST}")


def add_rest(product: ir.Node, end: ir.Node, rest: QuantizedValue) -> str:
    """Multiply the rest by the same weights, and add it to the result behind the bias.

    Before::

        x ─ QuantizeLinear ─ DequantizeLinear ─ MatMul(W) ─ Add(b) ─

    After::

        x ─┬─ QuantizeLinear ─ DequantizeLinear ─┬─ MatMul(W) ─ Add(b) ─ Add ─
           └───────────────────────────────── Sub ─ QuantizeLinear ─ DequantizeLinear ─ MatMul(W) ─┘

    Args:
        product: reads codes and int8 weights already.
        end: the Add of its bias, or itself.
        rest: what `rest` gave.

    Returns:
        The name of the second product.
    """
    name = f"{product.name}{REST}"
    stored = product.inputs[1].producer() if product.inputs[1] is not None else None
    if stored is None:
        raise ValueError(f"{product.name}: its weight has no codes")
    codes = [value for value in stored.inputs if value is not None]
    weight = add_node(end, "DequantizeLinear", codes, f"{name}/weight", {"axis": 1})
    fine = add_node(end, "MatMul", [rest.value, weight], name, like=product.outputs[0])
    output = end.outputs[0]
    insert_after(output, add_node_after(end, "Add", [output, fine], f"{name}/added"))
    return name
