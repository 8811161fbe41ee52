"""What other exporters write is recognised by what it computes: every form on the smallest graph, and near misses."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_passes import LAST, Node, graph, norm_constants, operators, rewritten, run

from edgeq.data.tokens import Feeds
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites
from edgeq.graph.float_session import FloatSession
from edgeq.graph.roles import Role
from edgeq.passes.drop_nan_guard import drop_nan_guard
from edgeq.passes.float_passes import FLOAT_PASSES
from edgeq.passes.fold_side_scales import fold_side_scales
from edgeq.passes.measured_reshape import measured_reshape
from edgeq.passes.recover_gelu import recover_gelu
from edgeq.passes.recover_layer_normalization import recover_layer_normalization
from edgeq.passes.recover_padding_mask import recover_padding_mask
from edgeq.passes.unflatten_softmax import unflatten_softmax

RNG = np.random.default_rng(1)
SCALARS = {
    name: np.array(value, np.float32)
    for name, value in (
        ("half", 0.5), ("one", 1.0), ("three", 3.0), ("c", 0.044715), ("root", math.sqrt(2 / math.pi)),
        ("quick", 1.702), ("root2", math.sqrt(2)), ("off", 0.05),
    )
}  # fmt: skip

POWER: list[Node] = [
    ("Pow", ["x", "three"], "cube", {}), ("Mul", ["c", "cube"], "small", {}), ("Add", ["x", "small"], "s", {}),
    ("Mul", ["s", "root"], "i", {}),
]  # fmt: skip
PRODUCTS: list[Node] = [  # x * root * (1 + c * x * x), as ONNX Runtime's own scripts have it
    ("Mul", ["x", "x"], "square", {}), ("Mul", ["square", "c"], "small", {}), ("Add", ["small", "one"], "s", {}),
    ("Mul", ["x", "root"], "r", {}), ("Mul", ["r", "s"], "i", {}),
]  # fmt: skip
HALF_X: list[Node] = [("Mul", ["x", "half"], "h", {}), ("Mul", ["h", "p"], "y", {})]
HALF_P: list[Node] = [("Mul", ["p", "half"], "h", {}), ("Mul", ["x", "h"], "y", {})]


@pytest.mark.parametrize("inner", [POWER, PRODUCTS])
@pytest.mark.parametrize("outer", [HALF_X, HALF_P])
def test_the_tanh_form_of_gelu_is_recovered(inner: list[Node], outer: list[Node]) -> None:
    nodes = [*inner, ("Tanh", ["i"], "t", {}), ("Add", ["t", "one"], "p", {}), *outer]
    model = graph(nodes, SCALARS, ["n", 4])
    new, done = rewritten(model, recover_gelu)
    assert (done.count, operators(new)) == (1, {"Gelu": 1})
    assert helper.get_attribute_value(new.graph.node[0].attribute[0]) == b"tanh"
    x = RNG.standard_normal((6, 4)).astype(np.float32) * 3
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-6


def test_gelu_with_another_constant_says_so() -> None:
    nodes = [*POWER, ("Tanh", ["i"], "t", {}), ("Add", ["t", "one"], "p", {}), *HALF_X]
    model = graph(nodes, SCALARS | {"c": SCALARS["off"]}, ["n", 4])
    new, done = rewritten(model, recover_gelu)
    assert done.count == 0 and "an Tanh that is no part of GELU" in done.near_misses[0]
    assert operators(new) == operators(model)


def test_the_sigmoid_form_is_another_function_and_stays() -> None:
    nodes: list[Node] = [("Mul", ["x", "quick"], "i", {}), ("Sigmoid", ["i"], "g", {}), ("Mul", ["x", "g"], "y", {})]
    new, done = rewritten(graph(nodes, SCALARS, ["n", 4]), recover_gelu)
    assert done.count == 0 and "only resembles GELU" in done.near_misses[0] and "Sigmoid" in operators(new)


def test_a_plain_tanh_is_no_near_miss() -> None:
    _, done = rewritten(graph([("Tanh", ["x"], "y", {})], {}, ["n", 4]), recover_gelu)
    assert done == Rewrites(0)


def norm(reciprocal: bool = False, weighted: bool = True, axis: int = -1, keep: int = 1) -> onnx.ModelProto:
    nodes: list[Node] = [
        ("ReduceMean", ["x", "last"], "mean", {"keepdims": 1}),
        ("Sub", ["x", "mean"], "d", {}),
        ("Mul", ["d", "d"], "squares", {}),
        ("ReduceMean", ["squares", "last"], "variance", {"keepdims": keep}),
        ("Add", ["eps", "variance"], "shifted", {}),
        ("Sqrt", ["shifted"], "root", {}),
    ]
    unit = "unit" if weighted else "y"
    if reciprocal:
        nodes += [("Reciprocal", ["root"], "inverse", {}), ("Mul", ["inverse", "d"], unit, {})]
    else:
        nodes += [("Div", ["d", "root"], unit, {})]
    if weighted:
        nodes += [("Mul", ["w", "unit"], "weighted", {}), ("Add", ["b", "weighted"], "y", {})]
    return graph(nodes, norm_constants() | {"last": np.array([axis], np.int64)}, [8, 8])


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
def test_every_form_of_layer_normalization_is_recovered(reciprocal: bool, weighted: bool, axis: int) -> None:
    model = norm(reciprocal, weighted, axis)
    new, done = rewritten(model, recover_layer_normalization)
    assert (done.count, operators(new)) == (1, {"LayerNormalization": 1})
    x = RNG.standard_normal((8, 8)).astype(np.float32)
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"), [({"axis": 0}, "not over the last axis"), ({"keep": 0}, "not over the")]
)
def test_a_near_layer_normalization_says_which_part_differs(changes: dict[str, int], reason: str) -> None:
    _, done = rewritten(norm(**changes), recover_layer_normalization)
    assert done.count == 0 and reason in done.near_misses[0]


def attention(mask_nodes: list[Node], condition: bool = False) -> onnx.ModelProto:
    """Make scores out of the ids, mask them, and sum what is left of a value of each key."""
    nodes: list[Node] = [
        ("Cast", ["input_ids"], "f", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["f", "axes12"], "row", {}),
        ("Unsqueeze", ["f", "axes13"], "column", {}),
        ("Mul", ["row", "column"], "scores", {}),
        *mask_nodes,
        ("Where", ["shut", "low", "scores"], "masked", {}) if condition else ("Add", ["bias", "scores"], "masked", {}),
        ("Softmax", ["masked"], "shares", {"axis": -1}),
        ("MatMul", ["shares", "column"], "out4", {}),
        ("Squeeze", ["out4", "axes13"], "sentence_embedding", {}),
    ]
    constants: dict[str, np.ndarray] = {
        "axes12": np.array([1, 2]), "axes13": np.array([1, 3]), "zero": np.array(0), "one": np.array(1, np.float32),
        "low": np.array(-3.4e38, np.float32), "large": np.array(-1e4, np.float32), "far": np.array(0.5, np.float32),
        "begin": np.array(0), "step": np.array(1), "axis1": np.array([1]), "axis0": np.array([0]),
    }  # fmt: skip
    made = [helper.make_node(op, ins, [out], name=f"node_{out}", **more) for op, ins, out, more in nodes]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    proto = helper.make_graph(made, "g", inputs, [output], weights)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


CLASSIC: list[Node] = [
    ("Unsqueeze", ["attention_mask", "axes12"], "m", {}), ("Cast", ["m"], "mf", {"to": TensorProto.FLOAT}),
    ("Sub", ["one", "mf"], "inverted", {}), ("Mul", ["inverted", "large"], "bias", {}),
]  # fmt: skip
FILLED: list[Node] = [
    ("Unsqueeze", ["attention_mask", "axes12"], "m", {}), ("Equal", ["m", "zero"], "shut0", {}),
    ("Shape", ["scores"], "size", {}), ("Expand", ["shut0", "size"], "shut", {}),
]  # fmt: skip
CAUSAL: list[Node] = [
    *CLASSIC[:3], ("Shape", ["input_ids"], "length1", {"start": 1}), ("Squeeze", ["length1", "axis0"], "length", {}),
    ("Range", ["begin", "length", "step"], "r", {}), ("Unsqueeze", ["r", "axis1"], "queries", {}),
    ("Less", ["queries", "r"], "later", {}), ("Cast", ["later"], "laterf", {"to": TensorProto.FLOAT}),
    ("Add", ["inverted", "laterf"], "both", {}), ("Mul", ["both", "large"], "bias", {}),
]  # fmt: skip
HALF: list[Node] = [*CLASSIC[:3], ("Mul", ["inverted", "large"], "b", {}), ("Add", ["b", "far"], "bias", {})]


def feeds() -> Feeds:
    ids = np.array([[1, 2, 3, 0], [2, 1, 0, 0]])
    return Feeds(ids, (ids > 0).astype(np.int64))


@pytest.mark.parametrize(("nodes", "condition"), [(CLASSIC, False), (FILLED, True)])
def test_a_mask_of_padding_is_recovered_from_any_arithmetic(nodes: list[Node], condition: bool) -> None:
    model = attention(nodes, condition)
    new, done = rewritten(model, recover_padding_mask)
    assert done == Rewrites(1)
    assert {"Sub", "Add", "Mul"} <= set(operators(new)) and not {"Where", "Expand"} & set(operators(new))
    assert "attention_mask_size" in {item.name for item in new.graph.initializer}
    before, after = (FloatSession.of(each)(feeds()) for each in (model, new))
    assert np.abs(before - after).max() < 1e-6


@pytest.mark.parametrize(("nodes", "reason"), [(CAUSAL, "depends on positions too"), (HALF, "or is not 0 elsewhere")])
def test_another_mask_is_left_alone_and_says_why(nodes: list[Node], reason: str) -> None:
    model = attention(nodes)
    new, done = rewritten(model, recover_padding_mask)
    assert done.count == 0 and reason in done.near_misses[0] and operators(new) == operators(model)


GUARD: list[Node] = [
    ("Add", ["x", "attention_mask_bias"], "masked", {}), ("Softmax", ["masked"], "p", {"axis": -1}),
    ("IsNaN", ["p"], "none", {}), ("Where", ["none", "zero", "p"], "y", {}),
]  # fmt: skip


@pytest.mark.parametrize("finite", [True, False])
def test_a_guard_goes_only_behind_a_finite_mask(finite: bool) -> None:
    make: Node = ("Mul", ["ones", "size" if finite else "big"], "attention_mask_bias", {})
    ones = np.ones((1, 4), np.float32)
    constants = {"ones": ones, "zero": np.array(0, np.float32), "big": np.array(-1e9, np.float32)}
    constants["size"] = np.array(1e4, np.float32)
    model = graph([make, *GUARD], constants, ["n", 4])
    if finite:
        roles.note(model.graph.node[0], Role.ATTENTION_MASK)
    new, done = rewritten(model, drop_nan_guard)
    assert (done.count, len(done.near_misses)) == ((1, 0) if finite else (0, 1))
    assert ("IsNaN" in operators(new)) is not finite
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    assert np.array_equal(run(model, x=x), run(new, x=x))


def token_graph(nodes: list[Node], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    made = [helper.make_node(op, ins, [out], name=f"node_{out}", **more) for op, ins, out, more in nodes]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, None)
    table = RNG.standard_normal((20, 8)).astype(np.float32)
    weights = [numpy_helper.from_array(array, name) for name, array in {"table": table, **constants}.items()]
    proto = helper.make_graph(made, "g", [ids], [output], weights)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


LOOKUP: Node = ("Gather", ["table", "input_ids"], "h", {})


@pytest.mark.parametrize(("shape", "wanted"), [([0, 0, -1, 4], [0, 0, 2, 4]), ([-1, 4], [-1, 4])])
def test_reshapes_are_measured(shape: list[int], wanted: list[int]) -> None:
    model = token_graph([LOOKUP, ("Reshape", ["h", "shape"], "sentence_embedding", {})], {"shape": np.array(shape)})
    new, done = rewritten(model, measured_reshape)
    (node,) = [node for node in new.graph.node if node.op_type == "Reshape"]
    (found,) = [numpy_helper.to_array(item) for item in new.graph.initializer if item.name == node.input[1]]
    assert found.tolist() == wanted and done.count == int(shape != wanted)


def test_a_reshape_that_changes_nothing_goes() -> None:
    nodes: list[Node] = [LOOKUP, ("Shape", ["h"], "size", {}), ("Reshape", ["h", "size"], "r", {})]
    model = token_graph([*nodes, ("Relu", ["r"], "sentence_embedding", {})], {})
    new, done = rewritten(model, measured_reshape)
    assert done.count == 1 and operators(new) == {"Gather": 1, "Relu": 1}


@pytest.mark.parametrize("axis", [2, 1])
def test_a_flattened_softmax_is_unflattened_over_the_last_axis_only(axis: int) -> None:
    nodes: list[Node] = [
        LOOKUP, ("Flatten", ["h"], "flat", {"axis": axis}), ("Softmax", ["flat"], "s", {"axis": -1}),
        ("Shape", ["h"], "size", {}), ("Reshape", ["s", "size"], "sentence_embedding", {}),
    ]  # fmt: skip
    new, done = rewritten(token_graph(nodes, {}), unflatten_softmax)
    assert (done.count, len(done.near_misses)) == ((1, 0) if axis == 2 else (0, 1))
    assert ("Flatten" in operators(new)) == (axis == 1)


def test_a_flattened_softmax_may_be_brought_back_more_than_once() -> None:
    nodes: list[Node] = [
        LOOKUP, ("Flatten", ["h"], "flat", {"axis": 2}), ("Softmax", ["flat"], "s", {"axis": -1}),
        ("Shape", ["h"], "size", {}), ("Reshape", ["s", "size"], "r", {}), ("Reshape", ["s", "size"], "t", {}),
        ("Neg", ["r"], "n", {}), ("Add", ["n", "t"], "sentence_embedding", {}),
    ]  # fmt: skip
    new, done = rewritten(token_graph(nodes, {}), unflatten_softmax)
    assert done == Rewrites(1) and not {"Flatten", "Reshape"} & set(operators(new))


def side_scaled(shared: bool) -> onnx.ModelProto:
    nodes: list[Node] = [
        ("MatMul", ["x", "wq"], "q", {}), ("Mul", ["q", "half"], "qs", {}),
        ("MatMul", ["x", "wk"], "k", {}), ("Transpose", ["k"], "kt", {"perm": [0, 2, 1]}),
        ("Mul", ["kt", "half"], "ks", {}), ("MatMul", ["qs", "ks"], "scores", {}),
        ("MatMul", ["scores", "qs" if shared else "x"], "y", {}),
    ]  # fmt: skip
    wq, wk = RNG.standard_normal((2, 8, 8)).astype(np.float32)
    return graph(nodes, {"wq": wq, "wk": wk, "half": SCALARS["half"]}, [2, "n", 8])


@pytest.mark.parametrize("shared", [False, True])
def test_scales_of_both_sides_move_into_the_weights(shared: bool) -> None:
    model = side_scaled(shared)
    new, done = rewritten(model, fold_side_scales)
    assert (done.count, len(done.near_misses)) == ((1, 1 + 1) if shared else (2, 0))
    x = RNG.standard_normal((2, 5, 8)).astype(np.float32)
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-5


def test_forms_are_imported_once() -> None:
    names = [rewrite.__name__ for rewrite in FLOAT_PASSES]
    assert len(names) == len(set(names)) and names.index("unflatten_softmax") < names.index("recover_padding_mask")
    assert LAST.tolist() == [-1]
