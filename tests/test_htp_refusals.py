"""A refusal for HTP names the operator, the part of the model, the module near it, and the way out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.quantization.htp import unsupported

Node = tuple[str, list[str], str]
STORED = {
    "two": np.array(2, np.float32), "three": np.array(3, np.float32), "axis": np.array([1], np.int64),
    "pad": np.array(1, np.int64), "model.layers.1.norm.weight": np.ones(8, np.float32),
    "model.positions.weight": np.ones((64, 8), np.float32), "axis0": np.array(1, np.int64),
    "last": np.array([-1], np.int64),
}  # fmt: skip
PARTS: dict[str, tuple[list[Node], str, str]] = {
    "cosines of the text": (
        [("Cos", ["h"], "y"), ("Mul", ["h", "y"], "x"), ("Add", ["x", "model.layers.1.norm.weight"], "z")],
        "Cos has no form", "near model.layers.1.norm",
    ),
    "RMSNorm": (
        [("Pow", ["h", "two"], "y"), ("ReduceMean", ["y", "last"], "mean"), ("Sqrt", ["mean"], "root"),
         ("Div", ["h", "root"], "unit"), ("Mul", ["unit", "model.layers.1.norm.weight"], "z")],
        "mean square (RMSNorm) has a form for HTP as", "near model.layers.1.norm",
    ),
    "a product with itself": (
        [("Mul", ["h", "h"], "y"), ("ReduceMean", ["y", "last"], "z")], "mean square (RMSNorm) has a form", "(Mul):",
    ),
    "no RMSNorm": (
        [("Pow", ["h", "three"], "y"), ("ReduceMean", ["y", "last"], "z")], "Pow has no form", "(Pow):",
    ),
    "counted positions": (
        [("Equal", ["input_ids", "pad"], "y"), ("Not", ["y"], "kept"), ("Cast", ["kept"], "whole"),
         ("CumSum", ["whole", "axis0"], "places"), ("Gather", ["model.positions.weight", "places"], "z")],
        "positions counted from the token ids", "near model.positions",
    ),
    "no positions": ([("Equal", ["input_ids", "pad"], "y"), ("Not", ["y"], "z")], "Equal has no form", "(Equal):"),
    "Where": (
        [("Equal", ["h", "two"], "is_two"), ("Where", ["is_two", "h", "three"], "y")], "but in max pooling", "(Where)",
    ),
}  # fmt: skip


def node_of(nodes: list[Node]) -> ir.Node:
    """Build a graph and give the node that makes y."""
    made = [
        helper.make_node(
            op, inputs, [output], name=f"node_{output}", **({"to": TensorProto.FLOAT} if op == "Cast" else {})
        )
        for op, inputs, output in nodes
    ]
    ports = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", "sequence", 8]),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in STORED.items()]
    output = helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, None)
    graph = helper.make_graph(made, "g", ports, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return next(node for node in ir.from_proto(model).graph if node.outputs[0].name == "y")


@pytest.mark.parametrize("name", PARTS)
def test_the_part_of_the_model_and_its_module_are_named(name: str) -> None:
    nodes, part, where = PARTS[name]
    said = unsupported.refusal(node_of(nodes))
    assert said.startswith("node_y (") and part in said and where in said
    assert said.endswith(f"{unsupported.WAY_OUT}.")


def test_what_was_found_stands_where_the_part_is_unknown() -> None:
    said = unsupported.refusal(node_of(PARTS["no RMSNorm"][0]), "reads h, which has no integer form")
    assert "reads h, which has no integer form" in said and "Pow has no form" not in said
    known = unsupported.refusal(node_of(PARTS["RMSNorm"][0]), "reads h, which has no integer form")
    assert "RMSNorm" in known and "reads h" not in known
