"""Quantise every tensor of an equalised float model to uint8 or uint16, for Hexagon's tensor unit.

LayerNormalization and LpNormalization stay whole, because the unit has operators for them. Which tensors have 8 bits
follows from one rule, not from names: what weight products and attention read and give has the scheme's bits; sums
(residual, positions, values over tokens), LayerNormalization, pooling, the outlier branch and what is one row a text
have 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import checked, constant, readers
from edgeq.graph.operators import HTP_COPIED
from edgeq.graph.roles import Role
from edgeq.quantization import affine, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.htp.attention_mask import LONGEST, lowered_mask, padding_cap, token_weights
from edgeq.quantization.htp.positions import quantized_positions
from edgeq.quantization.htp.unsupported import refusal
from edgeq.quantization.qdq import Quantized, UnsignedQdqBuilder, finished, int32_bias
from edgeq.quantization.ranges import GELU_FLOOR, MASKED_BELOW
from edgeq.quantization.rewrites.htp import htp_form
from edgeq.quantization.walk import (
    Refusal,
    Walk,
    move,
    name_output,
    pointwise,
    quantize_nodes,
    read_16bit,
    score_params,
)
from edgeq.records import HtpSpec, Scheme

GAIN_BITS = 8  # LayerNormalization's gain: the unit takes no other beside an int32 bias, on any version
# Of the multiplier that takes a channel's sum to the output's scale: v68 keeps no more, and where a multiplier has
# more, all of the channel is off by up to 20 steps of 65,536 (measured in QAIRT 2.51's emulator; later versions keep
# more).
_MULTIPLIER_BITS = 11


def quantize_htp(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    refusals: list[Refusal] | None = None,
    feeds: Sequence[AnyFeeds] = (),
) -> Quantized:
    """Rewrite weight products as Gemm, fold constants, and quantise every tensor to uint8 or uint16.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its decomposed norms.
        scheme: with an HtpSpec.
        refusals: where what cannot be quantised is collected instead of raised; missing statistics are made up then.
        feeds: probe batches on which each rewrite is proved in FP32; none where the same was proved before.

    Returns:
        The QDQ model, the names of the integer products, and an empty tuple: nothing stays float. Where something was
        collected it is the given model, and no names.

    Raises:
        Unsupported: the graph holds an operator that cannot be quantised.
        EdgeqError: a tensor has no statistics, or a rewrite changed the FP32 function.
    """
    spec = _spec(scheme)
    graph_model, seen, rows = htp_form(model, observed, spec, feeds)
    graph = graph_model.graph
    builder = UnsignedQdqBuilder(graph, seen, refusal, has_placeholders=refusals is not None)
    promoted = rows | frozenset(scheme.promoted)
    walk = HtpWalk(builder=builder, scheme=scheme, refusals=refusals, spec=spec, promoted=promoted)
    quantize_nodes(walk, HTP_QUANTIZERS, _is_lookup)
    if refusals:
        return Quantized(model, (), ())
    output = graph.outputs[0]
    name_output(walk, builder.read(output, 16, output.producer()))  # type: ignore[arg-type]
    return Quantized(finished(graph_model), tuple(walk.products), ())


def rewrite_htp(model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme) -> onnx.ModelProto:
    """Give the float model whose tensors `quantize_htp` quantises: weight products as Gemm, tokens a flat list."""
    return checked(htp_form(model, observed, _spec(scheme))[0])


def _spec(scheme: Scheme) -> HtpSpec:
    if not isinstance(scheme.spec, HtpSpec):
        raise EdgeqError(f"{scheme.name} is no scheme for HTP")
    return scheme.spec


@dataclass(kw_only=True)
class HtpWalk(Walk):
    """Hold what is known while one graph is quantised to unsigned integers.

    Attributes:
        spec: bits of products and attention.
        promoted: names of the weight products that read and give 16 bits.
        longest: how many tokens a text can have.
    """

    spec: HtpSpec
    promoted: frozenset[str]
    longest: int = LONGEST


def _is_lookup(walk: HtpWalk, node: ir.Node) -> bool:
    """Tell whether a node takes rows of the table of positions: their number follows from the sizes of the inputs."""
    variable = [value for value in node.inputs if value is not None and constant(value) is None]
    return node.op_type == "Slice" and bool(variable) and all(value in walk.of_sizes for value in variable)


# tables --------------------------------------------------------------------------------------------------------------


def _gather(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise Gather: of quantised values, or of a stored table, whose parameters its rows have."""
    if node.inputs[0] in walk.builder.quantized:
        move(walk, node)
        return
    table = constant(node.inputs[0])
    if table is None or node.inputs[0] is None:
        raise Unsupported(refusal(node, "Gather of something that is neither a table nor quantised"))
    stored = walk.builder.table(str(node.inputs[0].name), table, walk.scheme.embedding_bits, node)
    node.replace_input_with(0, stored.value)
    walk.builder.store(node, node.outputs[0], stored.params, stored.bits)


def _slice(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise Slice: of quantised values, or of the table of positions, constant as soon as the length is."""
    if node.inputs[0] in walk.builder.quantized:
        move(walk, node)
        return
    table = constant(node.inputs[0])
    if table is None or node.inputs[0] is None:
        raise Unsupported(refusal(node, "Slice of something that is neither a table nor quantised"))
    walk.longest = table.shape[-2]
    params = walk.builder.cover(float(table.min()), float(table.max()), 16)
    node.replace_input_with(0, walk.builder.integers(str(node.inputs[0].name), table, params, 16))
    walk.builder.store_integers(node, params, 16)


def _gather_elements(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise GatherElements by distance: which elements are taken follows from the length alone."""
    if node.inputs[1] not in walk.of_sizes:
        raise Unsupported(refusal(node, "GatherElements by what is computed from the text has no form for HTP"))
    move(walk, node)


# products ------------------------------------------------------------------------------------------------------------


def _gemm(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise input, weight, bias and output of a Gemm with a weight."""
    builder, weight, source = walk.builder, constant(node.inputs[1]), node.inputs[0]
    if weight is None or source is None:
        raise Unsupported(refusal(node, "a Gemm of two variable tensors has no form for HTP"))
    bits = 16 if _is_16bit(walk, node) else walk.spec.gemm_bits
    read = builder.read(source, bits, node)
    seen = builder.observed.get(builder.name_of(builder.home(source, node)))
    values, scales = weight_rounding.rounded(weight, seen, read.params.scale, walk.scheme.weight_bits)
    params = _product_params(walk, node.outputs[0], bits)
    if bits == 16:
        ratio = np.float64(read.params.scale) / params.scale
        scales = (affine.significant(scales * ratio, _MULTIPLIER_BITS) / ratio).astype(np.float32)
    lost = weight_rounding.lost_mean(weight, values, scales, seen)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    total = lost if bias is None else bias + lost
    step = np.float64(read.params.scale) * scales
    summand = int32_bias(node, str(node.name), f"{node.name}/bias", total, step)
    inputs = [read.value, builder.weight(node, values, scales), summand]
    node.resize_inputs(len(inputs))
    for position, value in enumerate(inputs):
        node.replace_input_with(position, value)
    walk.products.append(str(node.name))
    builder.store(node, node.outputs[0], params, bits)


def _product_params(walk: HtpWalk, output: ir.Value, bits: int) -> Affine:
    if bits == 16 or any(node.op_type != "Gelu" for node in readers(output)):
        return walk.builder.range(output, bits)
    seen = walk.builder.statistics(output)
    return walk.builder.cover(max(float(seen.minimum.min()), GELU_FLOOR), float(seen.maximum.max()), bits)


def _is_16bit(walk: HtpWalk, node: ir.Node) -> bool:
    """Tell whether a product belongs to the outlier branch, is promoted, or has one row a text."""
    return roles.has(node, Role.OUTLIER_BRANCH) or node.name in walk.promoted


# attention and pooling -----------------------------------------------------------------------------------------------


def _matmul(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise MatMul: of attention, or with pooling weights."""
    builder = walk.builder
    if any(value in walk.of_mask for value in node.inputs):
        for position, value in enumerate(node.inputs):
            is_weight = value in walk.of_mask
            operand = token_weights(walk, value, walk.longest) if is_weight else builder.read(value, 16, node)
            node.replace_input_with(position, operand.value)
        builder.store(node, node.outputs[0], builder.range(node.outputs[0], 16), 16)
        return
    bits = walk.spec.attention_bits
    for position, value in enumerate(node.inputs):
        if value is not None and value in walk.of_sizes:  # what stands for distances
            operand = quantized_positions(walk, value, bits, node, walk.longest)
        else:
            operand = builder.read(value, bits, node)
        node.replace_input_with(position, operand.value)
    followers = readers(node.outputs[0])
    if len(followers) == 1 and _ends_scores(walk, followers[0]):
        builder.store(node, node.outputs[0], _score_params(walk, followers[0]), bits)
    else:  # of the values: an 8-bit result is rounded otherwise over more tokens, padding or not
        builder.store(node, node.outputs[0], builder.range(node.outputs[0], 16), 16)


def _ends_scores(walk: HtpWalk, node: ir.Node) -> bool:
    """Tell whether a node is the softmax, or adds the mask: a bias by positions is added before in 16 bits."""
    return node.op_type == "Softmax" or (node.op_type == "Add" and any(value in walk.of_mask for value in node.inputs))


def _add(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise Add: of the mask to scores in the bits of attention, else in 16 bits."""
    position = next((place for place, value in enumerate(node.inputs) if value in walk.of_mask), None)
    if position is None:
        _arithmetic(walk, node)
        return
    bits = walk.spec.attention_bits
    mask, scores = node.inputs[position], node.inputs[1 - position]
    node.replace_input_with(position, lowered_mask(walk, mask, bits, node).value)
    node.replace_input_with(1 - position, walk.builder.read(scores, bits, node).value)
    walk.builder.store(node, node.outputs[0], _score_params(walk, node), bits)


def _score_params(walk: HtpWalk, masked: ir.Node) -> Affine:
    return score_params(walk, masked, walk.spec.attention_bits, MASKED_BELOW["normalized"])


def _softmax(walk: HtpWalk, node: ir.Node) -> None:
    bits = walk.spec.attention_bits
    node.replace_input_with(0, walk.builder.read(node.inputs[0], bits, node).value)
    walk.builder.store(node, node.outputs[0], Affine(2.0**-bits, 0, 0, 2**bits - 1), bits)


def _min(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise the Min of max pooling with the scale of the tokens: its cap saturates at both ends."""
    hidden, cap = node.inputs
    if cap is None or cap not in walk.of_mask:
        raise Unsupported(refusal(node, "a minimum that is no max pooling has no form for HTP"))
    read = walk.builder.read(hidden, 16, node)
    node.replace_input_with(0, read.value)
    node.replace_input_with(1, padding_cap(walk, cap, read, node).value)
    walk.builder.store(node, node.outputs[0], read.params, read.bits)


# norms and everything in 16 bits -------------------------------------------------------------------------------------


def _norm(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise LayerNormalization and RMSNormalization: uint16 in and out, uint8 or uint16 gain, int32 bias."""
    builder, gain = walk.builder, constant(node.inputs[1])
    if gain is None:
        raise Unsupported(refusal(node, f"{node.op_type} with a computed gain has no form for HTP"))
    read = builder.read(node.inputs[0], 16, node)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(gain)
    if bias is None:
        raise Unsupported(refusal(node, "LayerNormalization with a computed bias has no form for HTP"))
    bits = GAIN_BITS if node.op_type == "LayerNormalization" else 16
    stored = builder.table(f"{node.name}/gain", gain, bits, node)
    step = np.float64(read.params.scale * stored.params.scale)
    summand = int32_bias(node, str(node.name), f"{node.name}/bias", bias, step)  # type: ignore[arg-type]
    for position, value in enumerate((read.value, stored.value)):
        node.replace_input_with(position, value)
    if len(node.inputs) > 2:
        node.replace_input_with(2, summand)
    builder.store(node, node.outputs[0], builder.range(node.outputs[0], 16), 16)


def _fixed(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise Sigmoid, Tanh and LpNormalization to uint16 with the one range that they have for all inputs.

    Source: onnxruntime 1.31, python/tools/quantization/execution_providers/qnn/quant_config.py: HTP fixes these.
    """
    node.replace_input_with(0, walk.builder.read(node.inputs[0], 16, node).value)
    is_positive = node.op_type == "Sigmoid"
    params = Affine(2.0**-16, 0, 0, 65535) if is_positive else Affine(2.0**-15, 32768, 0, 65535)
    walk.builder.store(node, node.outputs[0], params, 16)


def _neg(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise Neg exactly: the scale stays, and the zero point stands as far from the other end."""
    source = walk.builder.home(node.inputs[0], node)
    node.replace_input_with(0, source.value)
    params = source.params
    turned = Affine(params.scale, params.high - params.zero_point, params.low, params.high)
    walk.builder.store(node, node.outputs[0], turned, source.bits)


def _division(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise a Div that a rewrite wrote, and gave a range; of others none is observed."""
    if str(node.outputs[0].name) not in walk.builder.observed:
        raise Unsupported(refusal(node, "Div by what is computed from the text has no form for HTP"))
    _arithmetic(walk, node)


def _arithmetic(walk: HtpWalk, node: ir.Node) -> None:
    """Quantise an operator whose operands and result have 16 bits."""
    for position, value in enumerate(node.inputs):
        if value is not None and value in walk.of_sizes:
            node.replace_input_with(position, quantized_positions(walk, value, 16, node, walk.longest).value)
        elif value is not None and value in walk.of_mask:
            node.replace_input_with(position, token_weights(walk, value, walk.longest).value)
        else:
            read_16bit(walk, node, position)
    walk.builder.store(node, node.outputs[0], walk.builder.range(node.outputs[0], 16), 16)


HTP_QUANTIZERS: Mapping[str, Callable[[HtpWalk, ir.Node], None]] = {
    **dict.fromkeys(HTP_COPIED, move),
    "Add": _add, "Div": _division, "Gather": _gather, "GatherElements": _gather_elements, "Gelu": pointwise,
    "Gemm": _gemm, "LayerNormalization": _norm, "LpNormalization": _fixed, "MatMul": _matmul, "Min": _min,
    "Mul": _arithmetic, "Neg": _neg, "RMSNormalization": _norm, "Relu": pointwise, "Sigmoid": _fixed,
    "Slice": _slice, "Softmax": _softmax, "Sub": _arithmetic, "Tanh": _fixed,
}  # fmt: skip
