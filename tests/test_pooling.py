"""Poolings in the integer-only form: FP32 keeps its function, padding stays out, and what is no pooling is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

from edgeq.backends.tflite import pooling as lowered
from edgeq.quantization.rewrites.pick_last_token import pick_last_token
from edgeq.quantization.rewrites.where_to_min import where_to_min

pytestmark = pytest.mark.tflite

DIM = 5
MASK = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.int64)
Node = tuple[str, list[str], str, dict[str, object]]
CONSTANTS = {
    "axis": np.array([1], np.int64), "last": np.array([-1], np.int64), "zero": np.array(0, np.float32),
    "fill": np.array(-1e4, np.float32), "minus": np.array([-1], np.int64), "end": np.array([-(2**63)], np.int64),
    "none": np.array(0, np.int64), "one": np.array(1, np.int64), "width": np.array([1, 1, DIM], np.int64),
    "least": np.array(1e-9, np.float32), "first": np.array([0], np.int64), "all": np.array([2**31], np.int64),
}  # fmt: skip
LARGEST: list[Node] = [
    ("Unsqueeze", ["attention_mask", "last"], "column", {}),
    ("Cast", ["column"], "mask", {"to": TensorProto.FLOAT}),
    ("Equal", ["mask", "zero"], "is_padding", {}),
    ("Where", ["is_padding", "fill", "h"], "filled", {}),
    ("ReduceMax", ["filled", "axis"], "y", {"keepdims": 0}),
]
LAST: list[Node] = [
    ("Slice", ["attention_mask", "minus", "end", "axis", "minus"], "flipped", {}),
    ("ReduceMax", ["flipped", "axis"], "any", {"keepdims": 0}),
    ("ArgMax", ["flipped"], "padding", {"axis": 1, "keepdims": 0}),
    ("Equal", ["any", "none"], "is_empty", {}),
    ("Shape", ["attention_mask"], "size", {"start": 1, "end": 2}),
    ("Squeeze", ["size"], "tokens", {}),
    ("Sub", ["tokens", "one"], "most", {}),
    ("Where", ["is_empty", "most", "padding"], "left_out", {}),
    ("Sub", ["tokens", "left_out"], "count", {}),
    ("Sub", ["count", "one"], "place", {}),
    ("Unsqueeze", ["place", "last"], "place2", {}),
    ("Unsqueeze", ["place2", "axis"], "place3", {}),
    ("Expand", ["place3", "width"], "places", {}),
    ("Unsqueeze", ["attention_mask", "last"], "column", {}),
    ("Cast", ["column"], "mask", {"to": TensorProto.FLOAT}),
    ("Mul", ["h", "mask"], "masked", {}),
    ("GatherElements", ["masked", "places"], "picked", {"axis": 1}),
    ("Squeeze", ["picked", "axis"], "y", {}),
]


def model_of(nodes: list[Node]) -> onnx.ModelProto:
    made = [helper.make_node(op, inputs, [output], name=output, **more) for op, inputs, output, more in nodes]
    ports = [
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", "sequence", DIM]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()]
    graph = helper.make_graph(made, "g", ports, [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, hidden: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"attention_mask": MASK, "h": hidden})[0]


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][-1]


@pytest.mark.parametrize("name", ["max", "lasttoken"])
def test_the_function_stays_and_padding_stays_out(name: str) -> None:
    nodes, rewrite = {"max": (LARGEST, where_to_min), "lasttoken": (LAST, pick_last_token)}[name]
    before = model_of(nodes)
    model = ir.from_proto(before)
    assert rewrite(model).count == 1
    hidden = np.random.default_rng(0).standard_normal((3, 6, DIM)).astype(np.float32) - 2.0  # a zero would be largest
    after = ir.to_proto(model)
    texts = [row[:count] for row, count in zip(hidden, MASK.sum(axis=1), strict=True)]
    expected = [text.max(axis=0) if name == "max" else text[-1] for text in texts]
    np.testing.assert_array_equal(run(before, hidden), expected)
    np.testing.assert_array_equal(run(after, hidden), expected)
    padded = np.where(MASK[:, :, None] == 0, hidden + 100.0, hidden).astype(np.float32)
    np.testing.assert_array_equal(run(after, padded), expected)


def changed(nodes: list[Node], output: str, inputs: list[str]) -> ir.Model:
    kept = [(op, inputs if name == output else read, name, more) for op, read, name, more in nodes]
    return ir.from_proto(model_of(kept))


def test_what_is_no_max_pooling_is_left_alone() -> None:
    for output, inputs in (
        ("filled", ["is_padding", "zero", "h"]),
        ("is_padding", ["mask", "least"]),
        ("column", ["padding", "last"]),
    ):
        nodes = LARGEST if output != "column" else [("Add", ["attention_mask", "one"], "padding", {}), *LARGEST]
        model = changed(nodes, output, inputs)
        assert where_to_min(model).count == 0
    model = changed([*LARGEST, ("Neg", ["filled"], "other", {})], "", [])
    assert where_to_min(model).count == 0


def test_what_is_no_last_token_is_left_alone() -> None:
    for output, inputs in (
        ("flipped", ["attention_mask", "first", "all", "axis", "axis"]),
        ("count", ["left_out", "tokens"]),
        ("masked", ["h", "h"]),
    ):
        model = changed(LAST, output, inputs)
        assert pick_last_token(model).count == 0, output


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([("Div", ["mask", "least"], "y", {})], lambda n: np.full(n, 1e9)),
        ([("CumSum", ["mask", "one"], "places", {}), ("Mul", ["places", "mask"], "y", {})], lambda n: np.arange(n) + 1),
    ],
    ids=["alike", "by place"],
)
def test_shares_are_what_the_model_gives_to_each_number_of_tokens(nodes: list[Node], expected) -> None:  # type: ignore[no-untyped-def]
    model = ir.from_proto(model_of([("Cast", ["attention_mask"], "mask", {"to": TensorProto.FLOAT}), *nodes]))
    found = lowered._shares_by_count(model.graph.outputs[0], 6)
    assert found.shape == (7, 6)
    for count in range(1, 7):
        np.testing.assert_allclose(found[count], np.pad(expected(count), (0, 6 - count)), rtol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(("kind", "power"), [("mean", 1.0), ("root", 0.5), ("weighted", None)])
def test_shares_without_a_table_are_recognised_by_what_they_are(kind: str, power: float | None) -> None:
    counted = {
        "mean": ("Identity", ["total"], "number", {}),
        "root": ("Sqrt", ["total"], "number", {}),
        "weighted": ("ReduceSum", ["weight", "axis"], "number", {"keepdims": 1}),
    }[kind]
    nodes: list[Node] = [
        ("Cast", ["attention_mask"], "mask", {"to": TensorProto.FLOAT}),
        ("CumSum", ["mask", "one"], "place", {}),
        ("Mul", ["place", "mask"], "weight", {}),
        ("ReduceSum", ["mask", "axis"], "total", {"keepdims": 1}),
        counted,
        ("Div", ["weight" if kind == "weighted" else "mask", "number"], "shares", {}),
        ("Unsqueeze", ["shares", "axis"], "row", {}),
        ("MatMul", ["row", "h"], "y", {}),
    ]
    graph = ir.from_proto(model_of(nodes)).graph
    row = next(node for node in graph if node.op_type == "Unsqueeze").outputs[0]
    assert lowered.share_power(row, 6) == power
