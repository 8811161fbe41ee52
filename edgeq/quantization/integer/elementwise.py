"""Quantise Add, Mul, Sub, sums, roots and sigmoids to int16 in and out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import constant, readers
from edgeq.graph.roles import Role
from edgeq.quantization.affine import Affine
from edgeq.quantization.integer.walk import POOLING_WEIGHT, IntegerWalk
from edgeq.quantization.qdq import symmetric
from edgeq.quantization.rewrites.npu_operators import ROOT_HEADROOM
from edgeq.quantization.walk import move, read_16bit

SIGMOID = Affine(1 / 32768, 0, -32768, 32767)
_INT16 = np.iinfo(np.int16)


def arithmetic(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise an operator whose operands and result have 16 bits."""
    builder = walk.builder
    if node.op_type == "Add" and _is_too_small(walk, node):
        return
    operands = 1 if node.op_type.startswith("Reduce") or node.op_type == "Clip" else len(node.inputs)
    for position, value in enumerate(node.inputs[:operands]):
        if value is not None and value in walk.of_mask:
            role = Role.POOLING_WEIGHTS if roles.has(value.producer(), Role.POOLING_WEIGHTS) else None
            node.replace_input_with(position, builder.quantize_once(value, POOLING_WEIGHT, 16, node, role).value)
        elif value is not None and value in walk.of_sizes:  # lowering computes it for each length, and stores integers
            params = symmetric(builder.largest(value), 16)
            node.replace_input_with(position, builder.quantize_once(value, params, 16, node).value)
        elif value is not None:
            read_16bit(walk, node, position)
    output = node.outputs[0]
    is_fixed = str(output.name) in builder.fixed
    params = builder.range(output, 16) if is_fixed or walk.sums is None else walk.sums.range_of_sum(output)
    builder.store(node, output, params, 16)


def _is_too_small(walk: IntegerWalk, node: ir.Node) -> bool:
    """Drop the Add of a constant that is below half a step, and tell whether that was done."""
    for position, value in enumerate(node.inputs):
        array, other = constant(value), node.inputs[1 - position]
        if array is None or other is None or other not in walk.builder.quantized:
            continue
        source = walk.builder.quantized[other]
        if np.abs(array).max() < source.params.scale / 2:
            walk.builder.quantized[node.outputs[0]] = source
            walk.builder.observed[str(node.outputs[0].name)] = walk.builder.statistics(other)
            return True
    return False


def rewritten(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise an operator that one of our rewrites inserted; the same operator in the user's model is unsupported."""
    if str(node.outputs[0].name) not in walk.builder.fixed:
        raise Unsupported(walk.builder.refusal(node, ""))
    arithmetic(walk, node)


def sigmoid(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise Sigmoid, whose int16 kernel gives one scale only."""
    walk.builder.fixed.setdefault(str(node.outputs[0].name), SIGMOID)
    arithmetic(walk, node)


def inverse_root(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise Sqrt and the Reciprocal behind it as one operator, with nothing rounded between them."""
    builder, inverse = walk.builder, readers(node.outputs[0])[0]
    if inverse.op_type != "Reciprocal" or len(node.outputs[0].uses()) != 1:
        raise Unsupported(builder.refusal(node, "a square root without reciprocal has no integer form"))
    read = builder.read(node.inputs[0], 16, node)
    node.replace_input_with(0, read.value)
    walk.done.add(inverse)
    output = inverse.outputs[0]
    params = builder.fixed.get(str(output.name))
    if params is None:
        # With a power of four below the smallest integer seen, 1 / sqrt is the same table for many norms.
        smallest = 1.0 / builder.largest(output) ** 2 / read.params.scale / ROOT_HEADROOM
        power = 4.0 ** max(0.0, float(np.floor(np.log2(max(smallest, 1.0)) / 2.0)))
        scale = float(np.float32(1.0 / (np.sqrt(power * read.params.scale) * _INT16.max)))
        params = Affine(scale, 0, _INT16.min, _INT16.max)
    builder.store(inverse, output, params, 16)


def minimum(walk: IntegerWalk, node: ir.Node) -> None:
    """Quantise the Min of max pooling.

    Its cap has the hidden states' scale: it saturates to the lowest integer for padding and to the highest for tokens.
    """
    hidden, cap = node.inputs
    if hidden is None or cap is None or hidden not in walk.builder.quantized or cap not in walk.of_mask:
        raise Unsupported(walk.builder.refusal(node, "a minimum that is no max pooling has no integer form"))
    source = walk.builder.quantized[hidden]
    capped = walk.builder.quantize_once(cap, source.params, source.bits, node, Role.PADDING_CAP)
    node.replace_input_with(1, capped.value)
    move(walk, node)
