"""Compute a model's outputs in FP64, operator by operator in ONNX's reference evaluator: what FP32 rounds away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgeq.errors import Unsupported
from edgeq.graph import external_data

Array = NDArray[Any]


def outputs(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, NDArray[np.float64]]:
    """Run an FP32 model in FP64: weights are widened when an operator reads them, and dropped behind it.

    What follows from the sizes of the inputs alone stays FP32: positions, and the buckets that their distances fall
    into, are choices of the model, and a bucket's bound may lie on the other side in FP64.

    Args:
        model: FP32 ONNX.
        feeds: arrays by name of the input.

    Returns:
        Every output by its name.

    Raises:
        Unsupported: the reference evaluator lacks an operator of the model.
    """
    stored = {item.name: item for item in model.graph.initializer}
    last = {name: place for place, node in enumerate(model.graph.node) for name in node.input}
    kept = {item.name for item in model.graph.output}
    values: dict[str, Array] = dict(feeds)
    varying = set(feeds)  # what depends on the numbers of the inputs, not on their sizes alone
    for place, node in enumerate(model.graph.node):
        names = [name for name in node.input if name]
        varies = node.op_type not in ("Shape", "Size") and not varying.isdisjoint(names)
        operands = {name: values[name] if name in values else external_data.array(stored[name]) for name in names}
        if varies:
            if node.op_type != "Gather":  # whose table is larger than the rows that are looked up
                operands = {name: _wide(array) for name, array in operands.items()}
            varying.update(node.output)
        found = _results(node, operands, varies)
        values |= zip(node.output, map(_wide, found) if varies else found, strict=False)
        for name in operands.keys() - kept:
            if last[name] == place:
                values.pop(name, None)
    return {name: np.asarray(values[name], np.float64) for name in kept}


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype in (np.float32, np.float16) else array


def _results(node: onnx.NodeProto, operands: Mapping[str, Array], is_wide: bool) -> list[Array]:
    """Run one operator; where it is wide, a Cast to FP32 gives FP64."""
    given = [operands[name] for name in node.input if name]
    if node.op_type in _OWN:
        return [_OWN[node.op_type](node, *given)]
    single = onnx.NodeProto()
    single.CopyFrom(node)
    for attribute in single.attribute:
        if is_wide and node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.DOUBLE
    try:
        with np.errstate(all="ignore"):  # what is computed for both branches of a Where need not be a number
            found = ReferenceEvaluator(single).run(None, dict(operands))
    except Exception as error:  # the boundary to onnx's evaluator, whose operators may raise anything
        raise Unsupported(f"{node.name}: {node.op_type} cannot be computed in FP64: {error}") from error
    return [np.asarray(each) for each in found]


def _erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.fromiter(map(math.erf, x.reshape(-1).tolist()), np.float64, x.size).reshape(x.shape)


def _gelu(node: onnx.NodeProto, x: NDArray[np.float64]) -> NDArray[np.float64]:
    is_tanh = any(attribute.s == b"tanh" for attribute in node.attribute)
    inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if is_tanh else _erf(x / math.sqrt(2))
    return np.asarray(0.5 * x * (1.0 + inner))


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


# What the reference evaluator lacks, bounds (GatherElements), or computes in FP32 whatever it is given; and products.
_OWN: Mapping[str, Callable[..., Array]] = {
    "Einsum": lambda node, *given: np.einsum(helper.get_attribute_value(node.attribute[0]).decode(), *given),
    "Erf": lambda node, x: _erf(x),
    "GatherElements": lambda node, x, indices: np.take_along_axis(x, indices, _axis(node)),
    "Gelu": _gelu,
    "MatMul": lambda node, a, b: np.matmul(a, b),
}
