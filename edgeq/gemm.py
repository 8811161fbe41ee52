"""Find the weight products of a float model and the tensors they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.passes.graph import constant, dims, made_by, readers

Kind = Literal["norm", "context", "activation"]
SIDE = "/side"  # ends the names of what belongs to the float path of massive neurons
_ACTIVATIONS = ("Gelu", "Relu", "Tanh", "Sigmoid", "Erf")


@dataclass(frozen=True)
class Site:
    """Hold one tensor that token-level weight products read.

    Attributes:
        tensor: float32[batch, sequence, channels].
        products: the MatMul nodes that read it, each with a constant weight float32[channels, out].
        kind: what makes the tensor, which decides how scale leaves it.
    """

    tensor: ir.Value
    products: tuple[ir.Node, ...]
    kind: Kind

    @property
    def name(self) -> str:
        """Give the tensor's name."""
        return str(self.tensor.name)

    def weights(self) -> list[NDArray[np.float32]]:
        """Give the weights of the products, each float32[channels, out]."""
        return [weight for node in self.products if (weight := constant(node.inputs[1])) is not None]


def sites(graph: ir.Graph) -> Iterator[Site]:
    """Give every tensor read by token-level weight products, in graph order.

    A product is token-level when its operand has the axes batch, sequence and channels. What comes after the pooling
    (Dense) has no sequence axis and stays float; so does the side path of massive neurons.
    """
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[0] is None:
            continue
        weight, shape = constant(node.inputs[1]), dims(node.inputs[0])
        if weight is None or weight.ndim != 2 or shape is None or len(shape) != 3 or str(node.name).endswith(SIDE):
            continue
        found.setdefault(node.inputs[0], []).append(node)
    for tensor, products in found.items():
        yield Site(tensor, tuple(products), _kind(tensor))


def _kind(tensor: ir.Value) -> Kind:
    maker = made_by(tensor, "Reshape", "Transpose", "LayerNormalization", "Mul", *_ACTIVATIONS)
    if maker is not None and maker.op_type == "Mul" and maker.name and maker.name.endswith("/scaled"):
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    if maker is not None and maker.op_type in ("Reshape", "Transpose"):
        return "context"
    return "norm" if maker is not None and maker.op_type == "LayerNormalization" else "activation"


@dataclass(frozen=True)
class FeedForward:
    """Hold the nodes of one feed-forward pair: first product and bias, activation, second product and bias."""

    first: ir.Node
    first_bias: ir.Node
    activation: ir.Node
    second: ir.Node
    second_bias: ir.Node


def feed_forwards(graph: ir.Graph) -> Iterator[FeedForward]:
    """Give every MatMul ─ Add ─ activation ─ MatMul ─ Add chain whose values are read once."""
    for node in graph:
        if node.op_type not in _ACTIVATIONS:
            continue
        add = made_by(node.inputs[0], "Add")
        first = next((m for v in add.inputs if (m := made_by(v, "MatMul"))), None) if add is not None else None
        after = readers(node.outputs[0])
        if (
            add is None
            or first is None
            or len(after) != 1
            or after[0].op_type != "MatMul"
            or str(first.name).endswith(SIDE)
        ):
            continue
        ends = readers(after[0].outputs[0])
        single = all(len(value.uses()) == 1 for value in (first.outputs[0], add.outputs[0]))
        if not single or len(ends) != 1 or ends[0].op_type != "Add":
            continue
        is_constant = all(constant(item.inputs[1]) is not None for item in (first, after[0]))
        if is_constant and bias_of(add) is not None and bias_of(ends[0]) is not None:
            yield FeedForward(first, add, node, after[0], ends[0])


def bias_of(add: ir.Node) -> tuple[int, NDArray[np.float32]] | None:
    """Give the position and the array of the constant operand of an Add."""
    for position, value in enumerate(add.inputs):
        array = constant(value)
        if array is not None:
            return position, array
    return None


def value_sum(site: Site) -> ir.Node | None:
    """Give the Add behind the value product whose rows attention mixes into a context, or None."""
    if site.kind != "context":
        return None
    mixed = made_by(_through(site.tensor), "MatMul")
    value = _through(mixed.inputs[1]) if mixed is not None and constant(mixed.inputs[1]) is None else None
    return made_by(value, "Add")


def _through(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (step := made_by(value, "Reshape", "Transpose")) is not None:
        value = step.inputs[0]
    return value
