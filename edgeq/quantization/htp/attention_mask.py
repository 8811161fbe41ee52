"""Quantise the attention mask to uint8 or uint16, looked up by the mask itself: no float tensor is made on the way."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph.attention_mask import allowed_pattern, is_of_padding
from edgeq.graph.edit import add_constant, add_node, made_by, required
from edgeq.quantization.htp.unsupported import refusal
from edgeq.quantization.qdq import QdqBuilder, QuantizedValue
from edgeq.quantization.walk import Walk, mask_size

# Tokens that can be counted where no table of positions says how many there can be: a count has steps of a fifth, so
# that each is exact in 16 bits.
LONGEST = 65535 // 5


def lowered_mask(walk: Walk, mask: ir.Value | None, bits: int, node: ir.Node) -> QuantizedValue:
    """Give what is added to scores [batch, heads, sequence, sequence], made once for all layers.

    Raises:
        Unsupported: the mask has another form.
    """
    builder, key = walk.builder, (mask, bits)
    if mask is None or key not in builder.converted:
        size = mask_size(mask)
        stem = f"{mask.name}/{bits}bit"  # type: ignore[union-attr]
        (tokens,) = (item for item in builder.graph.inputs if item.name == "attention_mask")
        rows = _look_up(builder, tokens, (-size, 0.0), bits, node, stem)
        axes = add_constant(builder.graph, f"{stem}/axes", np.array([1, 2], np.int64))
        spread = add_node(node, "Unsqueeze", [rows.value, axes], f"{stem}/spread")
        found = _store(builder, spread, rows, bits)
        allowed = allowed_pattern(required(mask))
        if allowed is not None:
            found = _limited(builder, found, allowed, size, node, stem)
        elif not is_of_padding(required(mask)):
            raise Unsupported(refusal(node, "attention is masked by more than padding and positions"))
        builder.converted[key] = found  # type: ignore[index]
    return builder.converted[key]  # type: ignore[index]


def _limited(
    builder: QdqBuilder, padding: QuantizedValue, allowed: ir.Value, size: float, node: ir.Node, stem: str
) -> QuantizedValue:
    """Let no query look where a causal or local pattern shuts it out: Min of two masks with one scale, exactly."""
    one, down = (
        add_constant(builder.graph, f"{stem}/{name}", np.array(number, np.float32))
        for name, number in (("one", 1.0), ("size", size))
    )
    shifted = add_node(node, "Sub", [allowed, one], f"{stem}/shut_out")
    pattern = add_node(node, "Mul", [shifted, down], f"{stem}/pattern")
    stored = builder.quantize(node, pattern, padding.params, padding.bits, f"{stem}/positions")
    limited = add_node(node, "Min", [padding.value, stored.value], f"{stem}/limited")
    return _store(builder, limited, padding, padding.bits)


def padding_cap(walk: Walk, cap: ir.Value, hidden: QuantizedValue, node: ir.Node) -> QuantizedValue:
    """Give what holds padding down for max pooling, looked up by the mask: the lowest integer of the tokens' scale.

    Raises:
        Unsupported: the cap is not of the form that `where_to_min` writes.
    """
    scaled = made_by(cap, "Mul")
    shifted = made_by(scaled.inputs[0], "Sub") if scaled is not None else None
    cast = made_by(shifted.inputs[0], "Cast") if shifted is not None else None
    if cast is None or cast.inputs[0] is None:
        raise Unsupported(refusal(node, "a minimum that is no max pooling has no form for HTP"))
    builder, stem = walk.builder, f"{node.name}/cap"
    params, bits = hidden.params, hidden.bits
    ends = np.array([params.low, params.high], builder.dtypes[bits])
    inputs = [add_constant(builder.graph, f"{stem}/codes", ends), *builder.parameters(stem, params, bits)]
    table = add_node(node, "DequantizeLinear", inputs, f"{stem}/dequantized")
    rows = add_node(node, "Gather", [table, cast.inputs[0]], f"{stem}/rows")
    return builder.store(required(rows.producer()), rows, params, bits)


def token_weights(walk: Walk, value: ir.Value | None, longest: int) -> QuantizedValue:
    """Give each token's weight in the pooling, or 0 or 1, in uint16, quantised step by step from the mask on.

    Args:
        walk: of the graph.
        value: follows from the mask alone.
        longest: how many tokens a text can have.

    Raises:
        Unsupported: a step cannot be quantised.
    """
    builder, node = walk.builder, value.producer() if value is not None else None
    if value is None or node is None:
        raise Unsupported("pooling reads the attention mask itself; a mask made float is needed")
    if value in builder.quantized:
        return builder.quantized[value]
    if node.op_type == "Cast" and node.inputs[0] is not None:
        result = _look_up(builder, node.inputs[0], (0.0, 1.0), 16, node, f"{node.name}/ones")
    elif node.op_type in ("Clip", "Max"):  # against division by zero: a text has tokens
        result = token_weights(walk, node.inputs[0], longest)
    else:
        result = _step(walk, node, value, longest)
    builder.quantized[value] = result
    return result


def _step(walk: Walk, node: ir.Node, value: ir.Value, longest: int) -> QuantizedValue:
    """Quantise one operator whose operands all follow from the mask."""
    count = 2 if node.op_type == "Div" else 1
    operands = [token_weights(walk, operand, longest) for operand in node.inputs[:count]]
    for position, operand in enumerate(operands):
        node.replace_input_with(position, operand.value)
    tops = {"ReduceSum": float(longest), "Div": 1.0}
    if node.op_type in tops:
        params = walk.builder.cover(0.0, tops[node.op_type], 16)
    elif node.op_type in ("Unsqueeze", "Transpose", "Squeeze", "Reshape"):
        params = operands[0].params
    else:
        raise Unsupported(refusal(node, f"{node.op_type} of the attention mask has no form for HTP"))
    return walk.builder.store(node, value, params, 16)


def _look_up(
    builder: QdqBuilder, mask: ir.Value, ends: tuple[float, float], bits: int, node: ir.Node, name: str
) -> QuantizedValue:
    """Give one value for 0 and another for 1 with Gather: both are represented exactly."""
    table = builder.table(f"{name}/table", np.array(ends, np.float32), bits, node)
    return _store(builder, add_node(node, "Gather", [table.value, mask], f"{name}/rows"), table, bits)


def _store(builder: QdqBuilder, value: ir.Value, source: QuantizedValue, bits: int) -> QuantizedValue:
    """Quantise a new node's output with the parameters of what it reads."""
    maker = value.producer()
    if maker is None:
        raise ValueError(f"{value.name}: has no node")
    return builder.store(maker, value, source.params, bits)
