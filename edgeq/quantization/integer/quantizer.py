"""Quantise every tensor of an equalised float model to int8 or int16, for runtimes without float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import constant, dims, readers, required
from edgeq.graph.linear import Linear
from edgeq.graph.operators import INTEGER_COPIED
from edgeq.graph.roles import Role
from edgeq.quantization import affine, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.integer.deferred_softmax import DeferredSoftmax
from edgeq.quantization.integer.elementwise import arithmetic, inverse_root, minimum, rewritten, sigmoid
from edgeq.quantization.integer.embedding_rows import is_pooled, scaled_rows
from edgeq.quantization.integer.exact_softmax import replace_softmax
from edgeq.quantization.integer.int32_sums import Int32Sums
from edgeq.quantization.integer.maps import (
    clip,
    convolution,
    is_mean_of_places,
    joined,
    pad,
    pool,
    skip_normalized_pixels,
    transpose,
)
from edgeq.quantization.integer.walk import POOLING_WEIGHT, IntegerWalk, attention_bits, is_single_token
from edgeq.quantization.output_precision import output_params
from edgeq.quantization.qdq import QdqBuilder, Quantized, finished, int32_bias, symmetric
from edgeq.quantization.ranges import GELU_FLOOR, MASKED_BELOW
from edgeq.quantization.rewrites.integer import integer_form
from edgeq.quantization.rewrites.npu_operators import npu_operators
from edgeq.quantization.walk import Refusal, mask_size, move, name_output, pointwise, quantize_nodes, score_params
from edgeq.records import IntegerSpec, Scheme

SOFTMAX = Affine(1 / 256, -128, -128, 127)


def quantize_integer(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    refusals: list[Refusal] | None = None,
    feeds: Sequence[AnyFeeds] = (),
) -> Quantized:
    """Decompose norms, fold constants, and quantise every tensor to int8 or int16.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its decomposed norms.
        scheme: with an IntegerSpec: bits of products, attention and the rest.
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
    graph_model, seen = integer_form(model, observed, spec, feeds)
    graph = graph_model.graph
    fixed = npu_operators(graph, seen, spec)
    RemoveUnusedNodesPass()(graph_model)
    TopologicalSortPass()(graph_model)
    # Sums in int32 take int8 values as they are, by a cast. Without them a scale of its own keeps a compiler (Vela)
    # from merging the copy into the product before it, which would no longer saturate.
    steps = 1 if spec.sum_bits == 32 else 256
    builder = QdqBuilder(graph, seen, steps_of_16bit=steps, has_placeholders=refusals is not None)
    builder.fixed = fixed
    single = (str(node.name) for node in graph if is_single_token(node, spec))
    promoted = frozenset({*scheme.promoted, *single})
    walk = IntegerWalk(
        builder=builder, scheme=scheme, refusals=refusals, spec=spec, promoted=promoted,
        sums=Int32Sums(builder, spec.gemm_bits, scheme.embedding_bits, promoted) if spec.sum_bits == 32 else None,
        softmaxes=DeferredSoftmax(builder) if spec.softmax == "deferred" else None,
    )  # fmt: skip
    skip_normalized_pixels(walk)
    quantize_nodes(walk, INTEGER_QUANTIZERS, _is_lookup)
    if refusals:
        return Quantized(model, (), ())
    _quantize_output(walk)
    return Quantized(finished(graph_model), tuple(walk.products), ())


def rewrite_integer(model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme) -> onnx.ModelProto:
    """Give the float model whose tensors `quantize_integer` quantises: norms decomposed, constants folded."""
    return ir.to_proto(integer_form(model, observed, _spec(scheme))[0])


def _spec(scheme: Scheme) -> IntegerSpec:
    if not isinstance(scheme.spec, IntegerSpec):
        raise EdgeqError(f"{scheme.name} is no integer-only scheme")
    return scheme.spec


def _is_lookup(walk: IntegerWalk, node: ir.Node) -> bool:
    """Tell whether a node looks up in a float table, other than one of biases by the distance of two positions."""
    table = constant(node.inputs[0]) if node.op_type in ("Gather", "Slice") else None
    is_by_distance = node.op_type == "Gather" and node.inputs[1] in walk.of_sizes
    return table is not None and table.dtype == np.float32 and not is_by_distance


def _quantize_output(walk: IntegerWalk) -> None:
    """Quantise the vectors to the scheme's bits, or to 16 where those would lose neighbours."""
    builder = walk.builder
    output = builder.graph.outputs[0]
    result = builder.quantized[output]
    params, bits = output_params(builder.statistics(output), walk.spec.output_bits)
    if bits != result.bits:
        result = builder.requantize(result, params, bits, f"{output.name}/output")
    name_output(walk, result)


# tables --------------------------------------------------------------------------------------------------------------


def _gather(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise Gather or Slice: of quantised values, or of rows of a stored table."""
    if node.inputs[0] in walk.builder.quantized:
        move(walk, node)
        return
    table = constant(node.inputs[0])
    if table is None or node.inputs[0] is None:
        found = f"{node.op_type} of something that is neither a table nor quantised"
        raise Unsupported(walk.builder.refusal(node, found))
    if node.op_type == "Gather" and is_pooled(node.outputs[0]):
        scaled_rows(walk.builder, node, walk.scheme.embedding_bits)
        return
    bits = walk.scheme.embedding_bits if node.op_type == "Gather" else 16
    params = symmetric(float(np.abs(table).max()), bits)
    node.replace_input_with(0, walk.builder.integers(str(node.inputs[0].name), table, params, bits))
    walk.builder.store_integers(node, params, bits)


# products ------------------------------------------------------------------------------------------------------------


def _matmul(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise MatMul: with a weight, with pooling weights, or of attention."""
    builder, (left, right) = walk.builder, node.inputs
    weight = constant(right)
    if weight is not None and roles.has(node, Role.ZERO_ONE_PRODUCT):
        _choice(walk, node, weight)
    elif weight is not None:
        _product(walk, node, weight)
    elif left is not None and left in walk.of_mask:
        node.replace_input_with(0, builder.quantize_once(left, POOLING_WEIGHT, 16, node, Role.POOLING_WEIGHTS).value)
        node.replace_input_with(1, builder.read(right, 16, node).value)
        builder.store(node, node.outputs[0], builder.range(node.outputs[0], 16), 16)
    elif walk.softmaxes is not None and walk.softmaxes.takes(left):
        walk.softmaxes.replace_product(node)
    else:
        bits, stored = attention_bits(walk, node), constant(left)
        if stored is not None and left is not None:  # one learned query
            asked = builder.table(f"{node.name}/{left.name}", stored, bits, node)
        else:
            asked = builder.read(left, bits, node)
        node.replace_input_with(0, asked.value)
        # XNNPACK of TensorFlow 2.21 leaves the zero point of an 8-bit right operand out.
        node.replace_input_with(1, builder.read_without_zero_point(right, bits, node).value)
        output = node.outputs[0]
        followers = readers(output)
        is_score = len(followers) == 1 and _ends_scores(walk, followers[0])
        params = _score_params(walk, followers[0], bits) if is_score else builder.range(output, bits)
        builder.store(node, output, params, bits)


def _ends_scores(walk: IntegerWalk, node: ir.Node) -> bool:
    """Tell whether a node is the softmax, or adds the mask, before which scores need no more than it reads."""
    adds_mask = node.op_type == "Add" and any(value in walk.of_mask for value in node.inputs)
    return node.op_type == "Softmax" or adds_mask


def _product(walk: IntegerWalk, node: ir.Node, weight: NDArray[np.float32]) -> None:
    """Quantise input, weight, bias and output of a MatMul with a weight."""
    builder = walk.builder
    source = node.inputs[0]
    bits = 16 if _is_16bit(walk, node) else walk.spec.gemm_bits
    read = builder.read(source, bits, node)
    seen = builder.observed.get(str(source.name)) if source is not None else None
    values, scales = weight_rounding.rounded(weight, seen, read.params.scale, walk.scheme.weight_bits)
    linear = Linear.of(node)  # as long as its weight is a constant
    node.replace_input_with(0, read.value)
    node.replace_input_with(1, builder.weight(node, values, scales))
    walk.products.append(str(node.name))
    end = node
    if linear is not None and linear.add is not None:
        end = linear.add
        walk.done.add(end)
        total = linear.bias + weight_rounding.lost_mean(weight, values, scales, seen)
        step = np.float64(read.params.scale) * scales
        end.replace_input_with(linear.bias_position, int32_bias(end, str(node.name), f"{node.name}/bias", total, step))
    builder.store(end, end.outputs[0], _product_params(walk, end.outputs[0], bits), bits)


def _choice(walk: IntegerWalk, node: ir.Node, matrix: NDArray[np.float32]) -> None:
    """Quantise a MatMul with zeros and ones; where it only picks channels, the parameters stay."""
    builder = walk.builder
    read = builder.read(node.inputs[0], 16, node)
    node.replace_input_with(0, read.value)
    node.replace_input_with(1, builder.weight(node, matrix.astype(np.int8), np.ones(matrix.shape[1], np.float32)))
    adds_up = matrix.sum(axis=0).max() > 1.0
    builder.store(node, node.outputs[0], builder.range(node.outputs[0], 16) if adds_up else read.params, 16)


def _product_params(walk: IntegerWalk, output: ir.Value, bits: int) -> Affine:
    kinds = {node.op_type for node in readers(output)}
    if bits == 16:
        return walk.builder.range(output, 16)
    if kinds <= {"Gelu"}:
        seen = walk.builder.statistics(output)
        top = max(float(seen.maximum.max()), 0.1)
        return affine.asymmetric(max(float(seen.minimum.min()), GELU_FLOOR), top, 8, signed=True)
    # On the way to 16 bits the scale stays exact without a zero point. And what attention multiplies must have none:
    # LiteRT multiplies by a right operand with one in its reference kernel, twenty times slower.
    if kinds <= {"Mul", "Add"} or kinds <= {"Reshape"}:
        return symmetric(walk.builder.largest(output), 8)
    return walk.builder.range(output, 8)


def _is_16bit(walk: IntegerWalk, node: ir.Node) -> bool:
    """Tell whether a product belongs to the outlier branch, is promoted, or has one row a text."""
    shape = dims(node.inputs[0])
    is_dense = shape is not None and len(shape) == 2
    return is_dense or roles.has(node, Role.OUTLIER_BRANCH) or node.name in walk.promoted


# attention -----------------------------------------------------------------------------------------------------------


def _softmax(walk: IntegerWalk, node: ir.Node) -> None:
    bits, source = attention_bits(walk, node), node.inputs[0]
    if bits == 16 and source in walk.masked:
        replace_softmax(walk.builder, node, required(source), walk.masked[source])
    elif bits == 16:
        scores = walk.builder.read(source, 16, node)
        replace_softmax(walk.builder, node, scores.value, scores.params)
    elif walk.softmaxes is not None:
        walk.softmaxes.replace_softmax(node)
    else:
        node.replace_input_with(0, walk.builder.read(source, 8, node).value)
        walk.builder.store(node, node.outputs[0], SOFTMAX, 8)


def _add(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise Add: of the mask to scores in 8 bits, or unrounded in front of a 16-bit Softmax; else in 16 bits."""
    position = next((place for place, value in enumerate(node.inputs) if value in walk.of_mask), None)
    if position is None:
        arithmetic(walk, node)
        return
    builder, bits = walk.builder, attention_bits(walk, node)
    scores, mask = node.inputs[1 - position], node.inputs[position]
    size = mask_size(mask)
    read = builder.read(scores, bits, node)
    if bits == 16:
        others = {use.op_type for use in readers(node.outputs[0])} - {"Softmax"}
        if others & INTEGER_QUANTIZERS.keys():  # any other operator is refused by its own name
            raise Unsupported(builder.refusal(node, "adds the mask to what is read by something else than a Softmax"))
        node.replace_input_with(0, read.value)
        node.replace_input_with(1, mask)
        roles.give(node, Role.MASKED_SCORES)
        walk.masked[node.outputs[0]] = read.params
        return
    node.replace_input_with(1 - position, read.value)
    # One step for the whole size would be right too, but XNNPACK adds only what differs by less than 256 in scale.
    steps = Affine(float(np.float32(size / 127)), 127, -128, 127)
    node.replace_input_with(position, builder.quantize_once(required(mask), steps, 8, node).value)
    builder.store(node, node.outputs[0], _score_params(walk, node, 8), 8)


def _score_params(walk: IntegerWalk, masked: ir.Node, bits: int) -> Affine:
    return score_params(walk, masked, bits, MASKED_BELOW["normalized" if bits == 16 else walk.spec.softmax])


def _unless_int32(quantize: Callable[[IntegerWalk, ir.Node], None]) -> Callable[[IntegerWalk, ir.Node], None]:
    """Leave a node that belongs to a sum in int32 to `Int32Sums`."""

    def either(walk: IntegerWalk, node: ir.Node) -> None:
        if walk.sums is not None and walk.sums.takes(node):
            walk.sums.quantize(node)
        else:
            quantize(walk, node)

    return either


def _mean(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise ReduceMean over tokens or places in 16 bits; over channels as part of a norm."""
    (arithmetic if is_mean_of_places(node) else _unless_int32(arithmetic))(walk, node)


INTEGER_QUANTIZERS: Mapping[str, Callable[[IntegerWalk, ir.Node], None]] = {
    **dict.fromkeys(INTEGER_COPIED, move),
    "Add": _unless_int32(_add), "AveragePool": pool, "Clip": clip, "Concat": joined, "Conv": convolution,
    "Gather": _unless_int32(_gather), "Gelu": pointwise, "MatMul": _matmul, "MaxPool": pool, "Min": minimum,
    "Mul": _unless_int32(arithmetic), "Pad": pad, "ReduceMean": _mean, "ReduceSum": rewritten,
    "ReduceSumSquare": arithmetic, "Relu": pointwise, "Sigmoid": sigmoid, "Slice": _gather, "Softmax": _softmax,
    "Sqrt": inverse_root, "Sub": _unless_int32(arithmetic), "Tanh": arithmetic, "Transpose": transpose,
}  # fmt: skip
