"""Verify a float model against the dialect: the operators with a reason in `operators.DIALECT`, opset 21, FP32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from edgeq.data.batches import PIXELS
from edgeq.errors import Unsupported
from edgeq.graph import external_data, operators
from edgeq.graph.origins import origin

OPSET = 21

LARGEST_CONSTANT = 1e30  # an infinite mask ruins every range it meets


class OutsideDialect(Unsupported):
    """Refuse a graph that leaves the dialect; `operators` names those of ONNX's own that it should not hold."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        """Take the message and the names of the operators."""
        super().__init__(message)
        self.operators = tuple(names)


def verify(model: onnx.ModelProto, name: str, float_ops: Sequence[str] = ()) -> None:
    """Check ops, opset, dtypes, constants, names and symbolic axes.

    Args:
        model: an ONNX model.
        name: for messages.
        float_ops: operators outside the dialect that may stay.

    Raises:
        OutsideDialect: with every violation, not only the first.
    """
    found = violations(model, float_ops)
    if found:
        listed = "\n".join(f"  - {item.sentence}" for item in found)
        standard = sorted({item.node.op_type for item in found if item.node and item.node.domain in ("", "ai.onnx")})
        raise OutsideDialect(f"{name}: the graph leaves the dialect of float models:\n{listed}", standard)


@dataclass(frozen=True)
class Violation:
    """Say where a model leaves the dialect; `node` is None where no single operator does."""

    sentence: str
    node: onnx.NodeProto | None = None


def violations(model: onnx.ModelProto, float_ops: Sequence[str] = ()) -> list[Violation]:
    """List what leaves the dialect: operators, opset, dtypes, constants, names and symbolic axes.

    Args:
        model: an ONNX model.
        float_ops: operators outside the dialect that may stay.
    """
    unknown = [Violation(_operator_problem(node), node) for node in _unknown_nodes(model, float_ops)]
    others = [*_opset_problems(model), *_constant_problems(model), *_interface_problems(model)]
    return [*unknown, *map(Violation, others)]


def _unknown_nodes(model: onnx.ModelProto, float_ops: Sequence[str]) -> list[onnx.NodeProto]:
    known = {*operators.DIALECT, *float_ops}
    return [node for node in model.graph.node if node.domain not in ("", "ai.onnx") or node.op_type not in known]


def _operator_problem(node: onnx.NodeProto) -> str:
    where = f" ({origin(node)})" if origin(node) else ""
    domain = f"{node.domain}::" if node.domain else ""
    return f"{node.name or node.output[0]}{where}: op {domain}{node.op_type}"


def _opset_problems(model: onnx.ModelProto) -> list[str]:
    problems = []
    opsets = {item.domain: item.version for item in model.opset_import}
    if opsets.get("") != OPSET:
        problems.append(f"opset {opsets.get('')}; {OPSET} is needed")
    return problems


def _constant_problems(model: onnx.ModelProto) -> list[str]:
    problems = []
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
            problems.append(f"{tensor.name}: {TensorProto.DataType.Name(tensor.data_type)}; FLOAT is needed")
        elif tensor.data_type == TensorProto.FLOAT:
            array = external_data.array(tensor)
            if array.size and not max(float(array.max()), -float(array.min())) < LARGEST_CONSTANT:
                problems.append(f"{tensor.name}: holds {array.flat[np.abs(array).argmax()]:g}; finite masks are needed")
    return problems


def _interface_problems(model: onnx.ModelProto) -> list[str]:
    problems = []
    inputs = [item.name for item in model.graph.input]
    takes_images = inputs == [PIXELS]
    if inputs != ["input_ids", "attention_mask"] and not takes_images:
        problems.append(f"inputs {inputs}; input_ids and attention_mask, or {PIXELS}, are needed")
    if not model.graph.output or model.graph.output[0].name != "sentence_embedding":
        problems.append("the first output is not sentence_embedding")
    for item in model.graph.input:
        shape = item.type.tensor_type.shape.dim
        if takes_images:
            is_image = len(shape) == 4 and shape[0].dim_param and all(dim.dim_value > 0 for dim in shape[1:])
            problems += [] if is_image else [f"{item.name}: its axes are not [batch, and three fixed sizes]"]
        elif len(shape) != 2 or any(not dim.dim_param for dim in shape):
            problems.append(f"{item.name}: its axes are not symbolic [batch, sequence]")
    return problems
