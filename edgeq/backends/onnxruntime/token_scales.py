"""Let QuantizeLinear divide each token by its own scale, instead of a Div in front of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, constant, dims, made_by, replace_uses, required
from edgeq.graph.roles import Role


def token_scales(model: ir.Model) -> int:
    """Quantise a flat list of tokens with a scale for each; give the number of tensors.

    Before::

        x[batch, sequence, in] ─ Div(largest) ─ QuantizeLinear(1/127) ─ DQ(1/127) ─

    After::

        x ─ Reshape[tokens, in] ─ QuantizeLinear(largest/127, axis 0) ─ Reshape[batch, sequence, in] ─ DQ(1/127) ─

    The Div is a pass over all values of its own. ONNX Runtime reads the scale of DequantizeLinear alone to find integer
    products, and takes no scale for each token there.
    """
    graph = model.graph
    found = [node for node in graph if node.op_type == "QuantizeLinear" and _div(node) is not None]
    shapes = _Shapes(graph)
    for node in found:
        tensor, largest = (required(value) for value in required(_div(node)).inputs)
        unit, zero_point = required(node.inputs[1]), required(node.inputs[2])
        width, name = _width(tensor), str(node.outputs[0].name)
        flat = add_node(node, "Reshape", [tensor, shapes.flat(width)], f"{name}/flat")
        row = add_node(node, "Reshape", [largest, shapes.flat()], f"{name}/row")
        scale = add_node(node, "Mul", [row, unit], f"{name}/scale")
        points = shapes.points(zero_point, row, tensor, node)
        codes = add_node(node, "QuantizeLinear", [flat, scale, points], f"{name}/rows", {"axis": 0})
        codes.dtype = required(node.outputs[0].dtype)
        back = add_node(node, "Reshape", [codes, shapes.like(tensor, largest, node)], f"{name}/axes")
        back.dtype, back.shape = required(node.outputs[0].dtype), node.outputs[0].shape
        replace_uses(node.outputs[0], back)
    RemoveUnusedNodesPass()(model)
    return len(found)


class _Shapes:
    """Make shapes and zero points of tokens, each once for tensors whose sequences have one name."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[str, ir.Value] = {}

    def flat(self, *width: int) -> ir.Value:
        """Give the shape [tokens, width], or [tokens]."""
        name = "_".join(map(str, ("tokens", *width)))
        return self._graph.initializers.get(name) or add_constant(self._graph, name, np.array([-1, *width], np.int64))

    def like(self, tensor: ir.Value, largest: ir.Value, before: ir.Node) -> ir.Value:
        """Give the shape of a tensor whose last axis is known."""
        sequence, width = self._sequence(tensor), _width(tensor)
        name = f"{sequence}/axes"
        if name not in self._made:
            self._made[name] = add_node(before, "Shape", [largest], name, {"start": 0, "end": 2})
        whole = f"{name}_{width}"
        if whole not in self._made:
            tail = add_constant(self._graph, f"{whole}/width", np.array([width], np.int64))
            self._made[whole] = add_node(before, "Concat", [self._made[name], tail], whole, {"axis": 0})
        return self._made[whole]

    def points(self, zero_point: ir.Value, row: ir.Value, tensor: ir.Value, before: ir.Node) -> ir.Value:
        """Give a zero point for each token."""
        name = f"{self._sequence(tensor)}/zero_points_{constant(zero_point)}"
        if name not in self._made:
            tokens = add_node(before, "Shape", [row], f"{name}/tokens")
            self._made[name] = add_node(before, "Expand", [zero_point, tokens], name)
            self._made[name].dtype = required(zero_point.dtype)
        return self._made[name]

    @staticmethod
    def _sequence(tensor: ir.Value) -> str:
        """Name the sequence: by its symbolic or known size, or else by the tensor."""
        size = required(dims(tensor))[1]
        return f"sequence_{size}" if size is not None else str(tensor.name)


def _div(node: ir.Node) -> ir.Node | None:
    """Give the Div by which a QuantizeLinear reads tokens that are scaled, each by itself."""
    div = made_by(node.inputs[0], "Div")
    return div if div is not None and roles.has(div, Role.TOKEN_SCALED) else None


def _width(tensor: ir.Value) -> int:
    """Give the number of channels, which a weight that multiplies them has made known."""
    width = required(dims(tensor))[2]
    if not isinstance(width, int):
        raise ValueError(f"{tensor.name}: its channels are not known")
    return width
