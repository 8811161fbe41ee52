"""Write Gather, Slice, Reshape, Squeeze and Transpose: TFLite operators that move values without changing them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from edgeq.backends.tflite.emitter import OPERATOR, OPTIONS, Emitter
from edgeq.errors import LoweringFailed
from edgeq.graph.edit import constant, made_by, readers


def gather(emit: Emitter, node: ir.Node) -> None:
    """Write a Gather of embedding rows by token id, or of one axis's positions in a constant order."""
    if made_by(node.inputs[0], "DequantizeLinear") is not None:
        _reordered(emit, node)
        return
    table = constant(node.inputs[0])
    dequantizer = next((use for use in readers(node.outputs[0]) if use.op_type == "DequantizeLinear"), None)
    if table is None or table.dtype == np.int64 or dequantizer is None or emit.ids is None:
        return  # sizes
    params = emit.params(dequantizer)
    stored = emit.out.constant(str(node.inputs[0].name), table, params)  # type: ignore[union-attr]
    result = emit.out.tensor(str(node.outputs[0].name), (1, emit.length, table.shape[1]), str(table.dtype), params)
    options = schema.GatherOptionsT()
    emit.out.operator(OPERATOR.GATHER, 2, [stored, emit.ids], result, (OPTIONS.GatherOptions, options))
    emit.tensors[node.outputs[0]] = result


def _reordered(emit: Emitter, node: ir.Node) -> None:
    """Write a Gather of one axis's positions in a constant order."""
    order = constant(node.inputs[1])
    if order is None:
        raise LoweringFailed(f"{node.name}: the order of its positions is no constant")
    source = emit.read(node.inputs[0])
    axis = node.attributes["axis"].as_int() % len(source.shape) if "axis" in node.attributes else 0
    index = emit.out.constant(str(node.inputs[1].name), order.astype(np.int32))  # type: ignore[union-attr]
    options = schema.GatherOptionsT()
    options.axis = axis
    shape = (*source.shape[:axis], *order.shape, *source.shape[axis + 1 :])
    emit.write(node.outputs[0], shape, OPERATOR.GATHER, 2, [source, index], (OPTIONS.GatherOptions, options))


def slice_(emit: Emitter, node: ir.Node) -> None:
    """Write a Slice: position embeddings, or the first token or channels of a tensor.

    The longest signature stores the rows of its positions as a constant; shorter ones gather their first rows from it.
    """
    table = constant(node.inputs[0])
    dequantizer = next((use for use in readers(node.outputs[0]) if use.op_type == "DequantizeLinear"), None)
    if made_by(node.inputs[0], "DequantizeLinear") is not None:
        _first_row(emit, node)
        return
    if table is None or dequantizer is None or table.ndim != 3:
        raise LoweringFailed(f"{node.name}: slices something else than a table of positions")
    name, params = str(node.outputs[0].name), emit.params(dequantizer)
    if emit.length == emit.longest:
        emit.tensors[node.outputs[0]] = emit.out.constant(name, table[:, : emit.length], params)
        return
    rows = emit.out.constant(f"{name}/table", table[0, : emit.longest], params)
    numbers = emit.out.constant("positions", np.arange(emit.length, dtype=np.int32)[None])
    result = emit.out.tensor(name, (1, emit.length, table.shape[2]), str(table.dtype), params)
    gather = (OPTIONS.GatherOptions, schema.GatherOptionsT())
    emit.tensors[node.outputs[0]] = emit.out.operator(OPERATOR.GATHER, 2, [rows, numbers], result, gather)


def _first_row(emit: Emitter, node: ir.Node) -> None:
    """Take the first token, or the first channels: as GATHER, or as SLICE where the target's `lookup` is "none"."""
    bounds = [constant(value) for value in node.inputs[1:4]]
    source = emit.read(node.inputs[0])
    numbers = [int(bound.reshape(-1)[0]) if bound is not None and bound.size == 1 else -1 for bound in bounds]
    axis, count, rank = numbers[2], numbers[1], len(source.shape)
    is_first = numbers[0] == 0 and 1 <= axis < rank and 1 <= count <= source.shape[axis]
    if not is_first or (rank == 3 and numbers[1:] != [1, 1]):
        raise LoweringFailed(f"{node.name}: slices something else than the first token or the first channels")
    shape = tuple(count if position == axis else size for position, size in enumerate(source.shape))
    if emit.settings.lookup == "none":
        label = "_".join(map(str, shape))
        begin, size = (
            emit.out.constant(f"first_{label}/{name}", np.array(numbers, np.int32))
            for name, numbers in (("begin", [0] * rank), ("size", shape))
        )
        table = (OPTIONS.SliceOptions, schema.SliceOptionsT())
        emit.write(node.outputs[0], shape, OPERATOR.SLICE, 4, [source, begin, size], table)
        return
    options = schema.GatherOptionsT()
    options.axis = axis
    stem = "first" if rank == 3 else f"first_{count}_channels"
    first = emit.out.constant(stem, np.arange(count, dtype=np.int32))
    emit.write(node.outputs[0], shape, OPERATOR.GATHER, 2, [source, first], (OPTIONS.GatherOptions, options))


def reshape(emit: Emitter, node: ir.Node) -> None:
    """Write Reshape and Squeeze as RESHAPE with the signature's sizes."""
    if made_by(node.inputs[0], "DequantizeLinear") is None:
        return  # part of the mask
    source = emit.read(node.inputs[0])
    if node.op_type == "Squeeze":
        axes = constant(node.inputs[1])
        dropped = {int(axis) % len(source.shape) for axis in axes.reshape(-1)} if axes is not None else set()
        shape = tuple(size for axis, size in enumerate(source.shape) if axis not in dropped)
    else:
        shape = _target(node, source.shape)
    quantizer = emit.quantizer(node.outputs[0])
    name = str(quantizer.outputs[0].name).removesuffix("/quantized")
    emit.tensors[quantizer.outputs[0]] = emit.reshaped(source, shape, name)


def _target(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    wanted = constant(node.inputs[1])
    if wanted is None:
        raise LoweringFailed(f"{node.name}: its shape is no constant")
    sizes = [shape[axis] if size == 0 else int(size) for axis, size in enumerate(wanted.tolist())]
    rest = int(np.prod(shape)) // max(1, -int(np.prod(sizes))) if -1 in sizes else 0
    return tuple(rest if size == -1 else size for size in sizes)


def transpose(emit: Emitter, node: ir.Node) -> None:
    """Write Transpose; the right operand of a MatMul gets its last two axes exchanged, for BATCH_MATMUL's adjY."""
    if made_by(node.inputs[0], "DequantizeLinear") is None:
        return  # part of the mask
    source = emit.read(node.inputs[0])
    perm = list(node.attributes["perm"].as_ints())
    quantizer = emit.quantizer(node.outputs[0])
    if _is_right_operand(quantizer):
        perm = [*perm[:-2], perm[-1], perm[-2]]
        emit.adjoint.add(quantizer.outputs[0])
    result = emit.result(quantizer, [source.shape[axis] for axis in perm])
    stored = emit.out.constant("perm_" + "_".join(map(str, perm)), np.array(perm, np.int32))
    options = (OPTIONS.TransposeOptions, schema.TransposeOptionsT())
    emit.out.operator(OPERATOR.TRANSPOSE, 2, [source, stored], result, options)


def _is_right_operand(quantizer: ir.Node) -> bool:
    dequantizers = readers(quantizer.outputs[0])
    uses = [use for item in dequantizers for use in item.outputs[0].uses()]
    return bool(uses) and all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)
