"""Read the inputs and attributes of a fused operator, and write the nodes that replace it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import add_constant, add_node, constant


class CannotExpand(Exception):
    """Say why a fused operator cannot be written in standard operators."""


@dataclass(frozen=True)
class FusedNode:
    """Hold a fused operator; nodes and constants are written before it, named after it."""

    graph: ir.Graph
    node: ir.Node

    @property
    def name(self) -> str:
        """Give the node's name, or its first output's where the node has none."""
        return self.node.name or str(self.node.outputs[0].name)

    def input(self, position: int) -> ir.Value | None:
        """Give an input, or None where it is left out."""
        return self.node.inputs[position] if position < len(self.node.inputs) else None

    def needed(self, position: int) -> ir.Value:
        """Give an input that the expansion needs.

        Raises:
            CannotExpand: it is left out.
        """
        value = self.input(position)
        if value is None:
            raise CannotExpand(f"its input {position} is not there")
        return value

    def refuse_inputs(self, *positions: int) -> None:
        """Refuse a node that uses one of these inputs.

        Raises:
            CannotExpand: it does.
        """
        for position in positions:
            if self.input(position) is not None:
                raise CannotExpand(f"its input {position} is used, which edgeq does not know how to write")

    def attribute(self, name: str, default: Any) -> Any:
        """Give an attribute's value, or the operator's default."""
        return self.node.attributes[name].value if name in self.node.attributes else default

    def array(self, position: int) -> NDArray[np.float32]:
        """Give the values of a constant input.

        Raises:
            CannotExpand: another node computes it.
        """
        array = constant(self.input(position))
        if array is None:
            raise CannotExpand(f"its input {position} is computed; constant weights are needed")
        return np.asarray(array, np.float32)

    def put(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Add a constant."""
        return add_constant(self.graph, f"{self.name}/{name}", array)

    def ints(self, name: str, *numbers: int) -> ir.Value:
        """Add a constant int64[numbers]."""
        return self.put(name, np.array(numbers, np.int64))

    def add(self, op_type: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """Write a node before the fused one, and give its output."""
        return add_node(self.node, op_type, inputs, f"{self.name}/{name}", attributes)
