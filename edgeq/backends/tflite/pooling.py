"""Write poolings over tokens: the weights of a weighted mean (int16), and max pooling with a padding cap."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite.emitter import OPERATOR, OPTIONS, Emitter
from edgeq.backends.tflite.writer import QuantParams, Tensor
from edgeq.errors import LoweringFailed
from edgeq.graph.edit import constant
from edgeq.graph.evaluate import computed


def share_power(value: ir.Value | None, length: int) -> float | None:
    """Give p where every token's share of a text of n tokens is n to the power of -p, for p of 1/2 and 1, else None."""
    found = _shares_by_count(value, length)[1:]
    counts = np.arange(1, length + 1)
    for power in (0.5, 1.0):
        wanted = np.tril(np.repeat(counts[:, None] ** -power, length, axis=1))
        if np.allclose(found, wanted, rtol=1e-5, atol=0.0):
            return power
    return None


def shares(emit: Emitter, node: ir.Node, shape: tuple[int, ...]) -> None:
    """Count the tokens, and look up what share each of that many has.

    Where all have the same, that is one number, which the mask multiplies; else it is a row of a table.
    """
    params = emit.params(node)
    name = str(node.outputs[0].name).removesuffix("/quantized")
    values = _shares_by_count(node.inputs[0], emit.length)
    table = np.rint(values.astype(np.float64) / params.scales[0]).astype(np.int16)
    axis = emit.out.constant("axis_1", np.array([1], np.int32))
    options = schema.ReducerOptionsT()
    options.keepDims = False
    count = emit.out.tensor(f"{name}/count", (1,), "int32")
    emit.out.operator(OPERATOR.SUM, 1, [emit.token_mask(), axis], count, (OPTIONS.ReducerOptions, options))
    alike = all(len(set(row[:number].tolist())) == 1 for number, row in enumerate(table[1:], start=1))
    if alike:
        inverse = _looked_up(emit, f"{name}/one_over_count", table[:, 0], count, f"{name}/inverse", params)
        ones = emit.out.tensor(f"{name}/mask", (1, emit.length), "int16", QuantParams.of(1.0))
        emit.cast(emit.token_mask(), ones)
        flat = emit.out.tensor(f"{name}/flat", (1, emit.length), "int16", params)
        emit.out.operator(OPERATOR.MUL, 2, [ones, inverse], flat, (OPTIONS.MulOptions, schema.MulOptionsT()))
    else:
        flat = _looked_up(emit, f"{name}/table", table, count, f"{name}/flat", params)
    emit.tensors[node.outputs[0]] = emit.reshaped(flat, shape, name)


def _shares_by_count(value: ir.Value | None, length: int) -> NDArray[np.float32]:
    """Compute the shares that the model itself gives to texts of 0 .. length tokens: float32[length + 1, length].

    A text of no tokens has the shares of one token.
    """
    counts = np.arange(1, length + 1)
    mask = (np.arange(length) < counts[:, None]).astype(np.int64)
    found = of_inputs(value, mask).reshape(length, length)
    return np.concatenate([found[:1], found])


def of_inputs(value: ir.Value | None, mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """Compute a tensor that follows from the mask, or from the sizes of the inputs, for int64[texts, tokens]."""
    return computed(value, dict.fromkeys(("input_ids", "attention_mask"), mask)).astype(np.float32)


def cap(emit: Emitter, node: ir.Node) -> None:
    """Look the mask up among the lowest and the highest code: they cap padding, and nothing."""
    params = emit.params(node)
    name = str(node.outputs[0].name).removesuffix("/quantized")
    zero_point = constant(node.inputs[2])
    limits: Any = np.iinfo(zero_point.dtype)  # type: ignore[union-attr]
    ends = np.array([limits.min, limits.max], limits.dtype)
    flat = _looked_up(emit, f"{name}/table", ends, emit.token_mask(), f"{name}/flat", params)
    emit.tensors[node.outputs[0]] = emit.reshaped(flat, (1, emit.length, 1), name)


def minimum(emit: Emitter, node: ir.Node) -> None:
    """Write a minimum of codes that mean the same: the kernel compares them as they are."""
    left, right = (emit.read(value) for value in node.inputs)
    options = (OPTIONS.MaximumMinimumOptions, schema.MaximumMinimumOptionsT())
    result = emit.write(node.outputs[0], left.shape, OPERATOR.MINIMUM, 2, [left, right], options)
    _require_one_scale(node, left, right, result)


def maximum(emit: Emitter, node: ir.Node) -> None:
    """Write the maximum over tokens."""
    axes = constant(node.inputs[1])
    if axes is None or axes.tolist() != [1] or node.attributes["keepdims"].as_int():
        raise LoweringFailed(f"{node.name}: a maximum over something else than tokens")
    source = emit.read(node.inputs[0])
    axis = emit.out.constant("axis_1", np.array([1], np.int32))
    options = schema.ReducerOptionsT()
    options.keepDims = False
    version = 3 if source.dtype == "int16" else 2
    shape = (source.shape[0], source.shape[2])
    kind = (OPTIONS.ReducerOptions, options)
    result = emit.write(node.outputs[0], shape, OPERATOR.REDUCE_MAX, version, [source, axis], kind)
    _require_one_scale(node, source, result)


def _require_one_scale(node: ir.Node, *tensors: Tensor) -> None:
    if len({(tensor.dtype, tensor.params) for tensor in tensors}) > 1:
        raise LoweringFailed(f"{node.name}: its operands and its result have different codes")


def _looked_up(
    emit: Emitter, stored: str, table: NDArray[Any], index: Tensor, name: str, params: QuantParams
) -> Tensor:
    """Write the lookup of a table's entries, or of its rows, in place of the index."""
    held = emit.out.constant(stored, table, params)
    shape = (*index.shape, *table.shape[1:])
    result = emit.out.tensor(name, shape, str(table.dtype), params)
    options = (OPTIONS.GatherOptions, schema.GatherOptionsT())
    return emit.out.operator(OPERATOR.GATHER, 2, [held, index], result, options)
