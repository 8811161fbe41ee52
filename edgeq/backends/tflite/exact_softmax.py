"""Write int16 softmax: the mask added in int32, exp from a table, int32 row sums, and a product with their inverses.

`edgeq.quantization.integer.exact_softmax` writes these nodes. LiteRT 2.3's 16-bit ADD of the mask and SOFTMAX take 2.6
and 1.1 ms for [12, 128, 128], all of this 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from edgeq.backends.tflite import attention_mask
from edgeq.backends.tflite.emitter import OPERATOR, OPTIONS, Emitter
from edgeq.backends.tflite.int32_sums import filled, raw, wide
from edgeq.backends.tflite.writer import QuantParams, Tensor
from edgeq.errors import LoweringFailed
from edgeq.graph import roles
from edgeq.graph.edit import constant, made_by, readers, required
from edgeq.graph.roles import Role
from edgeq.quantization.integer.exact_softmax import INVERSE_STEP, UNIT

_MASKED = 2**17  # codes below a score: whatever the scores, twice what int16 holds below the largest
_FARTHEST = 2**16 + 1  # codes below the largest of a row where every masked score lies


def writer_of(node: ir.Node) -> Callable[[Emitter, ir.Node], None] | None:
    """Give what writes a node of an int16 softmax by its role, or None."""
    found = next((WRITERS[role] for role in roles.of(node) if role in WRITERS), None)
    return found if found is not None and (node.op_type not in _SHARED or _has_16bits(node)) else None


def _has_16bits(node: ir.Node) -> bool:
    """Tell whether a node that softmaxes of 8 and of 16 bits have belongs to one of 16."""
    table = constant(node.inputs[0])
    if table is not None:
        return bool(table.dtype == np.int16)
    end = readers(node.outputs[0])[0]
    if node.op_type == "ReduceMax":
        stored = constant(end.inputs[2])
        return stored is not None and bool(stored.dtype == np.int16)
    exponential = made_by(node.inputs[0], "DequantizeLinear")
    coded = made_by(exponential.inputs[0], "QuantizeLinear") if exponential is not None else None
    return coded is not None and roles.has(coded.inputs[0].producer(), Role.SOFTMAX_EXPONENTIAL)  # type: ignore[union-attr]


def _masked(emit: Emitter, node: ir.Node) -> None:
    """Add the mask to scores in int32."""
    scores, mask = emit.read(node.inputs[0]), required(node.inputs[1])
    if mask not in emit.mask_rows:
        kept = attention_mask.kept(emit, mask)
        one = emit.out.constant("int32_1", np.array([1], np.int32))
        size = emit.out.constant("attention_mask/16bit", np.full((1, 1, 1, 1), _MASKED, np.int32))
        emit.mask_rows[mask] = raw(emit, "MUL", raw(emit, "SUB", kept, one), size)
    emit.exact[node.outputs[0]] = raw(emit, "ADD", wide(emit, scores), emit.mask_rows[mask])


def _scores(emit: Emitter, value: ir.Value | None) -> Tensor:
    """Give scores in int32, with their mask or without."""
    return emit.exact[value] if value in emit.exact else wide(emit, emit.read(value))


def _row_maximum(emit: Emitter, node: ir.Node) -> None:
    """Write the largest score of each row, in int32."""
    result = _reduced(emit, _scores(emit, node.inputs[0]), OPERATOR.REDUCE_MAX, 2)
    emit.tensors[emit.quantizer(node.outputs[0]).outputs[0]] = result


def _reduced(emit: Emitter, source: Tensor, operator: int, version: int) -> Tensor:
    """Reduce each row of an int32 tensor to one number."""
    options = schema.ReducerOptionsT()
    options.keepDims = True
    axis = emit.out.constant("last_of_4", np.array([len(source.shape) - 1], np.int32))
    result = emit.out.unnamed((*source.shape[:-1], 1), "int32")
    return emit.out.operator(operator, version, [source, axis], result, (OPTIONS.ReducerOptions, options))


def _exponential(emit: Emitter, node: ir.Node) -> None:
    """Look exp up by how far each score lies below the largest of its row; what lies farther than the table has 0."""
    difference = made_by(node.inputs[0], "Sub")
    stored = made_by(difference.inputs[1], "DequantizeLinear") if difference is not None else None
    if difference is None or stored is None:
        raise LoweringFailed(f"{node.name}: reads no difference of scores")
    step = emit.params(stored).scales[0]
    reach = min(math.ceil(math.log(2 * UNIT) / step) + 1, _FARTHEST)
    count = emit.out.constant(f"int32_{reach}", np.array([reach], np.int32))
    first = raw(emit, "SUB", emit.read(difference.inputs[1]), count)
    index = raw(emit, "SUB", _scores(emit, difference.inputs[0]), first)
    index = raw(emit, "MAXIMUM", index, filled(emit, 0, index.shape))
    entries = np.rint(UNIT * np.exp(np.arange(-reach, 1) * np.float64(step))).astype(np.int16)
    entries[0] = 0
    params = QuantParams.of(emit.result_step(node.outputs[0]))
    name = str(emit.quantizer(node.outputs[0]).outputs[0].name).removesuffix("/quantized")
    table = emit.out.constant(f"{name}/table", entries, params)
    options = (OPTIONS.GatherOptions, schema.GatherOptionsT())
    emit.write(node.outputs[0], index.shape, OPERATOR.GATHER, 2, [table, index], options)


def _row_sums(emit: Emitter, node: ir.Node) -> None:
    """Add each row's values of exp up in int32."""
    result = _reduced(emit, wide(emit, emit.read(node.inputs[0])), OPERATOR.SUM, 1)
    scaled = next(use for use in readers(node.outputs[0]) if use.op_type == "Mul")
    rounded = readers(scaled.outputs[0])[0]
    emit.tensors[readers(rounded.outputs[0])[0].outputs[0]] = result


def _inverse_sums(emit: Emitter, node: ir.Node) -> None:
    """Look up one over each row's sum in the table of one level, unless no row of this length reaches it."""
    index = required(made_by(node.inputs[1], "Min"))
    divided = required(made_by(index.inputs[0], "Div"))
    table, divisor = constant(node.inputs[0]), constant(divided.inputs[1])
    if table is None or divisor is None or divided.inputs[0] not in emit.tensors:
        raise LoweringFailed(f"{node.name}: looks up by no sum of a row")
    largest = UNIT * emit.length // int(divisor)
    if not table[: largest + 1].any():
        return
    bits = int(divisor).bit_length() - 1
    shifts = emit.out.constant(f"int32_{bits}", np.array([bits], np.int32))
    sums = raw(emit, "RIGHT_SHIFT", emit.tensors[divided.inputs[0]], shifts)
    if largest >= len(table):
        last = emit.out.constant(f"int32_{len(table) - 1}", np.array([len(table) - 1], np.int32))
        sums = raw(emit, "MINIMUM", sums, last)
    params = emit.params(readers(node.outputs[0])[0])
    stored = emit.out.constant(str(required(node.inputs[0]).name), table, params)
    result = emit.out.unnamed(sums.shape, "int16", params)
    options = (OPTIONS.GatherOptions, schema.GatherOptionsT())
    emit.tensors[node.outputs[0]] = emit.out.operator(OPERATOR.GATHER, 2, [stored, sums], result, options)


def _quotient(emit: Emitter, node: ir.Node) -> None:
    """Multiply values of exp by the inverse of their row's sum, in int32, and round once."""
    exponential = emit.read(node.inputs[0])
    total: Tensor | None = None
    for dequantizer in _levels(node.inputs[1]):
        if dequantizer.inputs[0] not in emit.tensors:
            continue  # no row reaches it
        found = wide(emit, emit.read(dequantizer.outputs[0]))
        factor = round(emit.params(dequantizer).scales[0] / INVERSE_STEP)
        if factor > 1:
            found = raw(emit, "MUL", found, emit.out.constant(f"int32_{factor}", np.array([factor], np.int32)))
        total = found if total is None else raw(emit, "ADD", total, found)
    if total is None:
        raise LoweringFailed(f"{node.name}: no level holds a sum; use shorter buckets")
    product = raw(emit, "MUL", wide(emit, exponential), total)
    bits = round(-math.log2(INVERSE_STEP))
    half = emit.out.constant(f"int32_{2 ** (bits - 1)}", np.array([2 ** (bits - 1)], np.int32))
    count = emit.out.constant(f"int32_{bits}", np.array([bits], np.int32))
    shifted = raw(emit, "RIGHT_SHIFT", raw(emit, "ADD", product, half), count)
    emit.cast(shifted, emit.result(emit.quantizer(node.outputs[0]), shifted.shape))


def _levels(value: ir.Value | None) -> Iterator[ir.Node]:
    add = made_by(value, "Add")
    if add is None:
        yield required(made_by(value, "DequantizeLinear"))
        return
    for operand in add.inputs:
        yield from _levels(operand)


def _with_its_reader(emit: Emitter, node: ir.Node) -> None:
    """Write nothing."""


_SHARED = ("Gather", "ReduceMax", "ReduceSum")  # which 8-bit softmaxes have under the same roles

WRITERS: Mapping[Role, Callable[[Emitter, ir.Node], None]] = {
    Role.MASKED_SCORES: _masked,
    Role.SOFTMAX_DIFFERENCE: _with_its_reader,
    Role.SOFTMAX_DIVISOR: _with_its_reader,
    Role.SOFTMAX_EXPONENTIAL: _exponential,
    Role.SOFTMAX_INVERSE: _inverse_sums,
    Role.SOFTMAX_MAXIMUM: _row_maximum,
    Role.SOFTMAX_QUOTIENT: _quotient,
    Role.SOFTMAX_SUM: _row_sums,
}
