"""A product with weights and its bias: found once, from either end."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.graph.linear import Linear, bias_of

CONSTANTS = {"w": np.ones((4, 4), np.float32), "b": np.arange(4, dtype=np.float32)}


def graph(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> ir.Graph:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    stored = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in outputs]
    return ir.from_proto(helper.make_model(helper.make_graph(list(nodes), "g", [x], ends, stored))).graph


def node(op_type: str, inputs: str, output: str) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=output)


PRODUCT = node("MatMul", "x w", "p")


@pytest.mark.parametrize("operands", ["p b", "b p"])
def test_a_bias_belongs_to_its_product(operands: str) -> None:
    found = graph(PRODUCT, node("Add", operands, "s"), node("Relu", "s", "y"))
    product, add, _ = found
    linear = Linear.of(product)
    assert linear == Linear(product, add) == Linear.making(add.outputs[0])
    assert linear is not None and linear.output.name == "s" and linear.bias_position == operands.split().index("b")
    np.testing.assert_array_equal(linear.bias, CONSTANTS["b"])
    np.testing.assert_array_equal(linear.weight, CONSTANTS["w"])


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ((node("Add", "p x", "y"),), ("y",)),
        ((node("Mul", "p b", "y"),), ("y",)),
        ((node("Add", "p b", "s"), node("Mul", "s p", "y")), ("y",)),
        ((node("Add", "p b", "y"),), ("y", "p")),
        ((node("Add", "p p", "y"),), ("y",)),
    ],
    ids=["no constant", "no sum", "read twice", "an output", "twice the same"],
)
def test_what_is_no_bias_of_the_product_alone_is_none(
    nodes: tuple[onnx.NodeProto, ...], outputs: tuple[str, ...]
) -> None:
    product, end = list(graph(PRODUCT, *nodes, outputs=outputs))[:2]
    linear = Linear.of(product)
    assert linear == Linear(product) == Linear.making(product.outputs[0])
    assert linear is not None and linear.output is product.outputs[0]
    assert Linear.making(end.outputs[0]) is None
    with pytest.raises(ValueError, match="p: has no bias"):
        _ = linear.bias


def test_a_product_of_two_tensors_is_none() -> None:
    (product,) = graph(node("MatMul", "x x", "y"))
    assert Linear.of(product) is None and Linear.making(product.outputs[0]) is None
    assert Linear.making(None) is None and bias_of(product) is None
