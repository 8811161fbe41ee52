"""Write deferred softmax (int8): EXP of each score, row sums in int32, and the inverse sums by a table.

The product with the values is scaled by the inverse sums afterwards; `edgeq.quantization.integer.deferred_softmax`
writes these nodes.

LiteRT 2.3's 8-bit SOFTMAX takes 0.39 ms for [12, 128, 128]; REDUCE_MAX, SUB and EXP take 0.09 ms together, a product
with the values 0.04 ms and its product with one factor for each row 0.01 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from edgeq.backends.tflite.emitter import OPERATOR, OPTIONS, Emitter
from edgeq.backends.tflite.int32_sums import raw
from edgeq.backends.tflite.writer import QuantParams
from edgeq.errors import LoweringFailed
from edgeq.graph import roles
from edgeq.graph.edit import constant, made_by, readers
from edgeq.graph.roles import Role
from edgeq.quantization.integer.deferred_softmax import LAST_INDEX


def writer_of(node: ir.Node) -> Callable[[Emitter, ir.Node], None] | None:
    """Give what writes a node of a deferred softmax by its role, or None; an index is written with its lookup."""
    return next((WRITERS[role] for role in roles.of(node) if role in WRITERS), None)


def _row_maximum(emit: Emitter, node: ir.Node) -> None:
    """Write the largest of each row."""
    source = emit.read(node.inputs[0])
    options = schema.ReducerOptionsT()
    options.keepDims = True
    axis = emit.out.constant("last_of_4", np.array([len(source.shape) - 1], np.int32))
    shape = (*source.shape[:-1], 1)
    emit.write(node.outputs[0], shape, OPERATOR.REDUCE_MAX, 2, [source, axis], (OPTIONS.ReducerOptions, options))


def exponential(emit: Emitter, node: ir.Node) -> None:
    """Write exp."""
    source = emit.read(node.inputs[0])
    options = (OPTIONS.ExpOptions, schema.ExpOptionsT())
    emit.write(node.outputs[0], source.shape, OPERATOR.EXP, 2, [source], options)


def _row_sums(emit: Emitter, node: ir.Node) -> None:
    """Add each row's codes up, exactly: a product with ones, of codes that are read as if their zero point were 0.

    LiteRT 2.3 leaves the zero point out of a product with a 32-bit result; tflite-runtime 2.14 does not.
    """
    source = emit.read(node.inputs[0])
    if source.params is None:
        raise LoweringFailed(f"{node.name}: adds up what has no codes")
    plain = emit.out.unnamed(source.shape, "int8", QuantParams.of(1.0))
    emit.copied(source, plain)
    width = source.shape[-1]
    ones = emit.out.constant(f"ones_1_1_1_{width}", np.ones((1, 1, 1, width), np.int8), QuantParams.of(1.0))
    options = schema.BatchMatMulOptionsT()
    options.adjY = True
    total = emit.out.unnamed((*source.shape[:-1], 1), "int32", QuantParams.of(1.0))
    emit.out.operator(OPERATOR.BATCH_MATMUL, 2, [plain, ones], total, (OPTIONS.BatchMatMulOptions, options))
    codes = _behind(node, "Mul", "Round", "Cast").outputs[0]
    divisors = [constant(use.inputs[1]) for use in readers(codes)]
    if all(largest_index(width, int(divisor)) > LAST_INDEX for divisor in divisors if divisor is not None):
        raise LoweringFailed(f"{node.name}: no level holds sums of {width} weights; use shorter buckets")
    missing = -width * source.params.zero_points[0]
    lacking = emit.out.constant(f"int32_{missing}", np.array([missing], np.int32))
    emit.tensors[codes] = raw(emit, "ADD", total, lacking)


def _inverse_sums(emit: Emitter, node: ir.Node) -> None:
    """Look up one over each row's sum, by the sum without its lowest bits."""
    table, dequantizer = constant(node.inputs[0]), readers(node.outputs[0])[0]
    index = made_by(node.inputs[1], "Min")
    divided = made_by(index.inputs[0], "Div") if index is not None else None
    divisor = constant(divided.inputs[1]) if divided is not None else None
    if table is None or divided is None or divisor is None or divided.inputs[0] not in emit.tensors:
        raise LoweringFailed(f"{node.name}: looks up by no sum of a row")
    sums = emit.tensors[divided.inputs[0]]
    bits = int(divisor).bit_length() - 1
    if bits:
        sums = raw(emit, "RIGHT_SHIFT", sums, emit.out.constant(f"int32_{bits}", np.array([bits], np.int32)))
    if largest_index(emit.length, int(divisor)) >= len(table):
        last = emit.out.constant(f"int32_{len(table) - 1}", np.array([len(table) - 1], np.int32))
        sums = raw(emit, "MINIMUM", sums, last)
    params = emit.params(dequantizer)
    stored = emit.out.constant(f"{node.inputs[0].name}/{bits}", table, params)  # type: ignore[union-attr]
    result = emit.out.unnamed(sums.shape, "int8", params)
    emit.tensors[node.outputs[0]] = emit.out.operator(
        OPERATOR.GATHER, 2, [stored, sums], result, (OPTIONS.GatherOptions, schema.GatherOptionsT())
    )


def largest_index(length: int, divisor: int) -> int:
    """Give the largest index that a row of so many weights can have."""
    return 255 * length // divisor


def left_out(graph: ir.Graph, length: int) -> set[ir.Node]:
    """Find the products of levels that no row of this length reaches: their inverses are 0 for all of its sums."""
    found: set[ir.Node] = set()
    for node in graph:
        index = made_by(node.inputs[1], "Min") if roles.has(node, Role.SOFTMAX_INVERSE) else None
        divided = made_by(index.inputs[0], "Div") if index is not None else None
        divisor = constant(divided.inputs[1]) if divided is not None else None
        table = constant(node.inputs[0])
        if table is not None and table.dtype != np.int8:
            continue  # a 16-bit softmax, which has one product
        if divisor is None or table is None or (table[: largest_index(length, int(divisor)) + 1] > table.min()).any():
            continue
        dequantizer = readers(node.outputs[0])[0]
        term = readers(dequantizer.outputs[0])[0]
        product = _made_before(term.inputs[0])
        coded = readers(term.outputs[0])[0]
        total = _behind(coded, "DequantizeLinear", "Add")
        found |= {node, product, *readers(product.outputs[0]), term, coded, total}
    return found


def unchanged(emit: Emitter, node: ir.Node) -> None:
    """Let a sum whose second term is left out be its first."""
    if node.op_type != "Add":
        return
    emit.tensors[emit.quantizer(node.outputs[0]).outputs[0]] = emit.read(node.inputs[0])


def _made_before(value: ir.Value | None) -> ir.Node:
    """Give the operator whose result a pair of QuantizeLinear and DequantizeLinear stands behind."""
    dequantizer = made_by(value, "DequantizeLinear")
    quantizer = made_by(dequantizer.inputs[0], "QuantizeLinear") if dequantizer is not None else None
    product = made_by(quantizer.inputs[0], "MatMul") if quantizer is not None else None
    if product is None:
        raise LoweringFailed(f"{value.name if value else None}: is no coded product")
    return product


def _behind(node: ir.Node, *op_types: str) -> ir.Node:
    """Follow the one reader of each kind."""
    for op_type in op_types:
        following = [use for use in readers(node.outputs[0]) if use.op_type == op_type]
        if len(following) != 1:
            raise LoweringFailed(f"{node.name}: no {op_type} reads it")
        node = following[0]
    return node


def _with_its_lookup(emit: Emitter, node: ir.Node) -> None:
    """Write nothing."""


WRITERS: Mapping[Role, Callable[[Emitter, ir.Node], None]] = {
    Role.SOFTMAX_INDEX: _with_its_lookup,
    Role.SOFTMAX_INVERSE: _inverse_sums,
    Role.SOFTMAX_MAXIMUM: _row_maximum,
    Role.SOFTMAX_SUM: _row_sums,
}
