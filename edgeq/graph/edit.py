"""Read and edit `onnx_ir` graphs: constants, producers, readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph import external_data, roles
from edgeq.graph.roles import Role

T = TypeVar("T")


@dataclass(frozen=True)
class Rewrites:
    """Say how often a pass matched, and why places that almost matched did not."""

    count: int
    near_misses: tuple[str, ...] = ()


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Give the array of an initializer or Constant node, or None when the value is computed or absent."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def is_constant(value: ir.Value | None) -> bool:
    """Tell whether a value is an initializer or what a Constant node gives, without reading it."""
    if value is None or value.const_value is not None:
        return value is not None
    node = value.producer()
    return node is not None and node.op_type == "Constant" and "value" in node.attributes


def scalar(value: ir.Value | None) -> float | None:
    """Give the number of a constant with one element, or None."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Give the producer of a value if it is one of these ops, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def readers(value: ir.Value) -> list[ir.Node]:
    """List the nodes that read a value."""
    return [use.node for use in value.uses()]


def is_read_once(value: ir.Value) -> bool:
    """Tell whether exactly one node input reads the value and it is no graph output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def add_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Register a new initializer; the name gets a number when it is taken."""
    unique, number = name, 1
    while unique in graph.initializers:
        unique, number = f"{name}_{number}", number + 1
    value = ir.Value(name=unique, const_value=external_data.tensor_of(array, unique))
    value.shape = ir.Shape(array.shape)
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def add_node(
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    attributes: dict[str, Any] | None = None,
    *,
    like: ir.Value | None = None,
    width: int | None = None,
    role: Role | None = None,
) -> ir.Value:
    """Insert a node with one output before another, and give its output, named like the node.

    Args:
        before: stands behind the new node.
        op_type: of the default domain.
        inputs: what the node reads.
        name: of the node and its output.
        attributes: by name.
        like: gives the output its shape, and its dtype, which is float32 where none is known.
        width: of the output's last axis, where it is another than that of `like`.
        role: what the node is for.
    """
    node = _named_node(op_type, inputs, name, attributes)
    _graph_of(before).insert_before(before, node)
    if like is not None:
        _take_shape(node.outputs[0], like, width)
    if role is not None:
        roles.give(node, role)
    return node.outputs[0]


def add_node_after(after: ir.Node, op_type: str, inputs: list[ir.Value], name: str) -> ir.Value:
    """Insert a node with one output behind another, and give its output, named like the node."""
    node = _named_node(op_type, inputs, name, None)
    _graph_of(after).insert_after(after, node)
    return node.outputs[0]


def insert_after(value: ir.Value, new: ir.Value) -> None:
    """Let every reader of a value read what a new node makes of it; the new node itself reads the value still."""
    for use in tuple(value.uses()):
        if use.node is not new.producer():
            use.node.replace_input_with(use.idx, new)


def required(found: T | None) -> T:
    """Give an operand or a producer that the graph is known to have.

    Raises:
        ValueError: it has none, which is a defect of edgeq.
    """
    if found is None:
        raise ValueError("an operator lacks an operand, or a value the operator that makes it")
    return found


def _take_shape(value: ir.Value, like: ir.Value, width: int | None) -> None:
    value.dtype = like.dtype if like.dtype is not None else ir.DataType.FLOAT
    if like.shape is not None:
        value.shape = like.shape if width is None else ir.Shape([*list(like.shape)[:-1], width])


def _named_node(op_type: str, inputs: list[ir.Value], name: str, attributes: dict[str, Any] | None) -> ir.Node:
    node = ir.node(op_type, inputs, attributes=attributes or {}, name=name)
    node.outputs[0].name = name
    return node


def _graph_of(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"node {node.name} stands in no graph")
    return node.graph


def checked(model: ir.Model) -> onnx.ModelProto:
    """Give the model as ONNX, checked, with shapes inferred anew: they let a runtime fuse around integer products."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    bare = external_data.bare(proto)
    onnx.checker.check_model(bare, full_check=True)
    return _with_shapes(proto, bare)


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write the shape of every value anew: rewrites leave shapes behind that are no longer true."""
    del model.graph.value_info[:]
    return _with_shapes(model, external_data.bare(model))


def _with_shapes(model: onnx.ModelProto, bare: onnx.ModelProto) -> onnx.ModelProto:
    """Take in the shapes that are inferred without the large weights."""
    inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True).graph
    model.graph.value_info.extend(inferred.value_info)
    del model.graph.output[:]
    model.graph.output.extend(inferred.output)
    return model


def fix_shape(graph: ir.Graph, node: ir.Node, shape: list[int]) -> None:
    """Give a Reshape a constant shape, in which 0 copies the input's dimension; equal shapes are one initializer."""
    name = f"shape_{'_'.join(str(number) for number in shape)}"
    known = graph.initializers.get(name)
    node.replace_input_with(1, known or add_constant(graph, name, np.array(shape, np.int64)))
    node.attributes.pop("allowzero", None)


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` read `new`; a graph output keeps its name."""
    for use in tuple(old.uses()):
        use.node.replace_input_with(use.idx, new)
    graph = old.graph
    if graph is not None:
        for position, output in enumerate(graph.outputs):
            if output is old:
                old_name = old.name
                old.name = f"{old_name}_replaced"
                new.name = old_name
                new.shape = old.shape
                if old.dtype is not None:
                    new.dtype = old.dtype
                graph.outputs[position] = new


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """Give the shape with symbolic dimensions as names, or None when unknown."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def replace_constant(graph: ir.Graph, node: ir.Node, position: int, array: NDArray[np.floating]) -> None:
    """Give the node a changed constant; an initializer that nobody else reads keeps its name."""
    old = node.inputs[position]
    if old is None:
        return
    name = str(old.name)
    if old.name in graph.initializers and len(old.uses()) == 1:
        graph.initializers.pop(name)
    node.replace_input_with(position, add_constant(graph, name, array.astype(np.float32)))
