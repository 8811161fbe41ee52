"""Find the weight products of a float model and the tensors they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph import roles
from edgeq.graph.edit import constant, dims, made_by, readers
from edgeq.graph.rms_norm import root_mean_square
from edgeq.graph.roles import Role

Kind = Literal["norm", "context", "activation"]
_ACTIVATIONS = ("Gelu", "Mish", "Relu", "Tanh", "Sigmoid", "Erf")
_BY_NEURON = frozenset({*_ACTIVATIONS, "Add", "Div", "Mul", "Neg", "Pow", "Sub"})


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
        if weight is None or weight.ndim != 2 or shape is None or len(shape) != 3:
            continue
        if roles.has(node, Role.OUTLIER_BRANCH):
            continue
        found.setdefault(node.inputs[0], []).append(node)
    for tensor, products in found.items():
        yield Site(tensor, tuple(products), _kind(tensor))


def _kind(tensor: ir.Value) -> Kind:
    maker = made_by(tensor, "Reshape", "Transpose", "LayerNormalization", "Mul", "Add", "MatMul", *_ACTIVATIONS)
    if maker is not None and roles.has(maker, Role.SMOOTHED):
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    if root_mean_square(maker) is not None:
        return "norm"
    if maker is not None and maker.op_type in ("Reshape", "Transpose"):
        return "context"
    if maker is not None and maker.op_type in _ACTIVATIONS:
        return "activation"
    # A product whose output other products read is like a norm's: quiet channels in texts are quiet in all texts.
    is_like_norm = maker is not None and maker.op_type in ("LayerNormalization", "Add", "MatMul")
    return "norm" if is_like_norm else "activation"


@dataclass(frozen=True)
class FeedForward:
    """Hold the nodes of one feed-forward block: first products, what is done to each neuron by itself, second product.

    Attributes:
        firsts: the MatMul nodes whose columns are neurons: one, or value and gate.
        inside: the nodes between first products and second one, in graph order.
        second: the MatMul node whose weight has a row for each neuron.
        end: the second product with its bias.
    """

    firsts: tuple[ir.Node, ...]
    inside: tuple[ir.Node, ...]
    second: ir.Node
    end: ir.Value

    @property
    def hidden(self) -> ir.Value:
        """Give what the second product reads, float32[batch, sequence, neurons]."""
        hidden = self.second.inputs[0]
        if hidden is None:
            raise ValueError(f"{self.second.name}: reads nothing")
        return hidden


def feed_forwards(graph: ir.Graph) -> Iterator[FeedForward]:
    """Give every chain of first products, elementwise operators with an activation, and a second product.

    A neuron may be a column of one product (GELU) or of two (a gate times a value), but nothing else may read what lies
    between: then a neuron can leave its block without a trace.
    """
    for node in graph:
        weight = constant(node.inputs[1]) if node.op_type == "MatMul" and len(node.inputs) == 2 else None
        if weight is None or weight.ndim != 2 or roles.has(node, Role.OUTLIER_BRANCH):
            continue
        cone = _elementwise_cone(node, weight.shape[0])
        if cone is None:
            continue
        firsts, inside = cone
        if not any(step.op_type in _ACTIVATIONS for step in inside):
            continue
        end = _biased(node)
        if readers(end):
            place = {step: position for position, step in enumerate(graph)}
            firsts.sort(key=place.__getitem__)
            inside.sort(key=place.__getitem__)
            yield FeedForward(tuple(firsts), tuple(inside), node, end)


def _elementwise_cone(second: ir.Node, width: int) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """Collect the weight products that elementwise operators make a value of, and these operators, or give None."""
    firsts: list[ir.Node] = []
    inside: list[ir.Node] = []
    waiting = [second.inputs[0]]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is None or value is None or value.is_graph_output():
            return None
        if node in firsts or node in inside:
            continue
        weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.shape == (weight.shape[0], width) and not roles.has(node, Role.OUTLIER_BRANCH):
            firsts.append(node)
        elif node.op_type in _BY_NEURON and _are_of_neurons(node, width):
            inside.append(node)
            waiting += [item for item in node.inputs if item is not None and constant(item) is None]
        else:
            return None
    known = {second, *inside}
    return (firsts, inside) if all(set(readers(item.outputs[0])) <= known for item in (*firsts, *inside)) else None


def _are_of_neurons(node: ir.Node, width: int) -> bool:
    """Tell whether a node's constants are numbers, or hold one number for each neuron."""
    arrays = [array for item in node.inputs if (array := constant(item)) is not None]
    return all(array.size == 1 or array.shape[-1] == array.size == width for array in arrays)


def _biased(product: ir.Node) -> ir.Value:
    """Give a product with its bias, or as it is without one."""
    following = readers(product.outputs[0])
    if len(following) == 1 and following[0].op_type == "Add" and bias_of(following[0]) is not None:
        return following[0].outputs[0]
    return product.outputs[0]


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
