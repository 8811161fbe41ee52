"""Verify a float model against the dialect: the operators with a reason in `operators.DIALECT`, opset 21, FP32.

Other operators of ONNX's own may be in it, too: they are float islands, which targets that keep floats take.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import onnx
from onnx import TensorProto

from edgeq.data.batches import PIXELS
from edgeq.errors import Unsupported
from edgeq.graph import external_data, operators
from edgeq.graph.origins import origin
from edgeq.records import Island

OPSET = 21

LARGEST_CONSTANT = 1e30  # an infinite mask ruins every range it meets


_WAY_OUT = "Write that part with operators of edgeq.graph.operators.DIALECT, or leave it out of the model."
_DEFAULT_DOMAIN = ("", "ai.onnx")
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def verify(model: onnx.ModelProto, name: str) -> None:
    """Check ops, opset, dtypes, constants, names and symbolic axes.

    Args:
        model: an ONNX model.
        name: for messages.

    Raises:
        Unsupported: with every violation, not only the first.
    """
    found = violations(model)
    if found:
        listed = "\n".join(f"  - {item.sentence}" for item in found)
        others = f"Else export with opset {OPSET} and without optimisation."
        way_out = _WAY_OUT if all(item.node is not None for item in found) else others
        raise Unsupported(f"{name}: the graph leaves the dialect of float models:\n{listed}\n{way_out}")


@dataclass(frozen=True)
class Violation:
    """Say where a model leaves the dialect; `node` is None where no single operator does."""

    sentence: str
    node: onnx.NodeProto | None = None


def violations(model: onnx.ModelProto) -> list[Violation]:
    """List what no target takes: operators, opset, dtypes, constants, names and symbolic axes.

    Operators that may stay float are not among them: see `island_nodes`.

    Args:
        model: an ONNX model.
    """
    unknown = [Violation(f"{_named(node)}; {why}", node) for node in _unknown(model) if (why := _why_no_island(node))]
    others = [*_opset_problems(model), *_constant_problems(model), *_interface_problems(model)]
    return [*unknown, *map(Violation, others)]


def island_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """List the nodes outside the dialect that can stay float: operators of ONNX's own, from tensors to tensors.

    Args:
        model: an ONNX model.
    """
    return [node for node in _unknown(model) if not _why_no_island(node)]


def islands(model: onnx.ModelProto) -> tuple[Island, ...]:
    """Count the float islands by operator, with the line of the first of each.

    Args:
        model: an ONNX model whose nodes still have their origins.
    """
    nodes = sorted(island_nodes(model), key=lambda node: node.op_type)
    groups = [(operator, list(group)) for operator, group in groupby(nodes, key=lambda node: node.op_type)]
    return tuple(
        Island(operator=operator, count=len(group), origin=origin(group[0]) or group[0].name or group[0].output[0])
        for operator, group in groups
    )


def _unknown(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """List the nodes whose operator the dialect lacks."""
    known = operators.DIALECT
    return [node for node in model.graph.node if node.domain not in _DEFAULT_DOMAIN or node.op_type not in known]


def _why_no_island(node: onnx.NodeProto) -> str:
    """Say why an operator outside the dialect cannot even stay float, or give an empty string."""
    if node.domain not in _DEFAULT_DOMAIN:
        return "an operator of ONNX's own is needed"
    if any(item.type in _GRAPHS for item in node.attribute):
        return "control flow has graphs inside, which no rewrite reads; Where chooses between two tensors"
    if node.op_type in operators.QUANTIZED:
        return "the model is quantised already; its FP32 form is needed"
    if not onnx.defs.has(node.op_type, OPSET, ""):
        return f"opset {OPSET} has no such operator"
    if node.op_type in operators.RANDOM:
        return "a text must have the same vector each time, and that draws at random"
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    if any(not kind.startswith("tensor(") for item in (*schema.inputs, *schema.outputs) for kind in item.types):
        return "only tensors are taken, no sequences"
    return ""


def _named(node: onnx.NodeProto) -> str:
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
