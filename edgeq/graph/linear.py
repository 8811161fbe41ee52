"""Find the MatMuls with constant weights of a float model: their biases, the tensors they read, feed-forward blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph import roles
from edgeq.graph.edit import constant, dims, is_read_once, made_by, readers
from edgeq.graph.operators import ACTIVATIONS, ELEMENTWISE
from edgeq.graph.rms_norm import root_mean_square
from edgeq.graph.roles import Role

Maker = Literal["norm", "context", "activation"]


@dataclass(frozen=True)
class Linear:
    """Hold x @ W + b: a MatMul with a constant weight, and the Add of a constant that alone reads it.

    Weight and bias are read from the graph when they are asked for: rewrites change them.

    Attributes:
        product: the MatMul.
        add: the Add of the bias, or None where there is none.
    """

    product: ir.Node
    add: ir.Node | None = None

    @classmethod
    def of(cls, product: ir.Node) -> Linear | None:
        """Take a MatMul, with the bias behind it; None where it has no constant weight."""
        if product.op_type != "MatMul" or constant(product.inputs[1]) is None:
            return None
        output = product.outputs[0]
        add = readers(output)[0] if is_read_once(output) else None
        return cls(product, add if add is not None and bias_of(add) is not None else None)

    @classmethod
    def making(cls, value: ir.Value | None) -> Linear | None:
        """Find the MatMul that makes a value, alone or with a bias; None where there is none."""
        end = made_by(value, "Add", "MatMul")
        found = bias_of(end) if end is not None else None
        product = made_by(end.inputs[1 - found[0]], "MatMul") if end is not None and found is not None else end
        linear = cls.of(product) if product is not None else None
        return linear if linear is not None and linear.end is end else None

    @property
    def weight(self) -> NDArray[np.float32]:
        """Give the weight, float32[..., in, out]."""
        weight = constant(self.product.inputs[1])
        if weight is None:
            raise ValueError(f"{self.product.name}: its weight is no constant any more")
        return weight

    @property
    def bias(self) -> NDArray[np.float32]:
        """Give the bias as it is stored, where there is one."""
        return self._bias()[1]

    @property
    def bias_position(self) -> int:
        """Give the place of the bias among the inputs of the Add."""
        return self._bias()[0]

    def _bias(self) -> tuple[int, NDArray[np.float32]]:
        found = bias_of(self.add) if self.add is not None else None
        if found is None:
            raise ValueError(f"{self.product.name}: has no bias; look at `add` first")
        return found

    @property
    def end(self) -> ir.Node:
        """Give the node that makes the result: the Add, or the MatMul where there is none."""
        return self.product if self.add is None else self.add

    @property
    def output(self) -> ir.Value:
        """Give the result."""
        return self.end.outputs[0]


@dataclass(frozen=True)
class Site:
    """Hold one tensor of tokens, and the MatMuls with constant weights that read it: one place for SmoothQuant.

    Attributes:
        tensor: float32[batch, sequence, channels].
        products: the MatMul nodes that read it, each with a constant weight float32[channels, out].
        maker: what makes the tensor, which decides where its scale can go: a LayerNormalization or RMSNorm, attention
            (its context), or an activation.
    """

    tensor: ir.Value
    products: tuple[ir.Node, ...]
    maker: Maker

    @property
    def name(self) -> str:
        """Give the tensor's name."""
        return str(self.tensor.name)

    def weights(self) -> list[NDArray[np.float32]]:
        """Give the weights of the products, each float32[channels, out]."""
        return [weight for node in self.products if (weight := constant(node.inputs[1])) is not None]


def sites(graph: ir.Graph) -> Iterator[Site]:
    """Give every float32[batch, sequence, channels] tensor that MatMuls with constant weights read, in graph order.

    What comes after the pooling (Dense) has no sequence axis and is left out; so is the branch of outlier neurons.
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
        yield Site(tensor, tuple(products), _maker(tensor))


def _maker(tensor: ir.Value) -> Maker:
    maker = made_by(tensor, "Reshape", "Transpose", "LayerNormalization", "Mul", "Add", "MatMul", *ACTIVATIONS)
    if maker is not None and roles.has(maker, Role.SMOOTHED):
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    if root_mean_square(maker) is not None:
        return "norm"
    if maker is not None and maker.op_type in ("Reshape", "Transpose"):
        return "context"
    if maker is not None and maker.op_type in ACTIVATIONS:
        return "activation"
    # The output of a product is like that of a norm: a channel near 0 in some texts is near 0 in all texts.
    is_like_norm = maker is not None and maker.op_type in ("LayerNormalization", "Add", "MatMul")
    return "norm" if is_like_norm else "activation"


@dataclass(frozen=True)
class FeedForward:
    """Hold the nodes of one feed-forward block (FFN, GLU): MatMuls, elementwise operators, and a MatMul.

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
    """Find every chain of MatMuls, elementwise operators with an activation among them, and one MatMul behind.

    A neuron may be a column of one MatMul (GELU) or of two (GLU: a gate times a value). Nothing else may read what lies
    between, so that a neuron can be moved out of its block.
    """
    for node in graph:
        weight = constant(node.inputs[1]) if node.op_type == "MatMul" and len(node.inputs) == 2 else None
        if weight is None or weight.ndim != 2 or roles.has(node, Role.OUTLIER_BRANCH):
            continue
        cone = _elementwise_cone(node, weight.shape[0])
        if cone is None:
            continue
        firsts, inside = cone
        if not any(step.op_type in ACTIVATIONS for step in inside):
            continue
        linear = Linear.of(node)
        if linear is not None and readers(linear.output):
            place = {step: position for position, step in enumerate(graph)}
            firsts.sort(key=place.__getitem__)
            inside.sort(key=place.__getitem__)
            yield FeedForward(tuple(firsts), tuple(inside), node, linear.output)


def _elementwise_cone(second: ir.Node, width: int) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """Walk up from a MatMul through elementwise operators to the MatMuls before them; None where anything else is met.

    Returns:
        The MatMuls and the operators between.
    """
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
        is_product = node.op_type == "MatMul" and not roles.has(node, Role.OUTLIER_BRANCH)
        weight = constant(node.inputs[1]) if is_product else None
        if weight is not None and weight.shape == (weight.shape[0], width):
            firsts.append(node)
        elif node.op_type in ELEMENTWISE and _are_of_neurons(node, width):
            inside.append(node)
            waiting += [item for item in node.inputs if item is not None and constant(item) is None]
        else:
            return None
    known = {second, *inside}
    return (firsts, inside) if all(set(readers(item.outputs[0])) <= known for item in (*firsts, *inside)) else None


def _are_of_neurons(node: ir.Node, width: int) -> bool:
    """Tell whether no operand is left out, and each constant holds one number, or one for each neuron."""
    arrays = [array for item in node.inputs if (array := constant(item)) is not None]
    are_of_neurons = all(array.size == 1 or array.shape[-1] == array.size == width for array in arrays)
    return are_of_neurons and None not in node.inputs


def bias_of(add: ir.Node) -> tuple[int, NDArray[np.float32]] | None:
    """Give the position and the array of the constant operand of an Add; None for other nodes, and without one."""
    for position, value in enumerate(add.inputs if add.op_type == "Add" else ()):
        array = constant(value)
        if array is not None:
            return position, array
    return None


def value_projection(site: Site) -> Linear | None:
    """Give the value projection whose rows attention mixes into a context, with its bias; None where it has no bias."""
    if site.maker != "context":
        return None
    mixed = made_by(_through(site.tensor), "MatMul")
    value = _through(mixed.inputs[1]) if mixed is not None and constant(mixed.inputs[1]) is None else None
    linear = Linear.making(value)
    return linear if linear is not None and linear.add is not None else None


def _through(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (step := made_by(value, "Reshape", "Transpose")) is not None:
        value = step.inputs[0]
    return value
