"""Rewrites that newer text architectures need: structure, numbers, and what only resembles the pattern."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_passes import Node, graph, operators, rewritten, run

from edgeq.graph import roles
from edgeq.graph.float_noise import distances
from edgeq.graph.rms_norm import root_mean_square
from edgeq.graph.roles import Role
from edgeq.passes.drop_reshape import drop_reshape
from edgeq.passes.finite_mask import finite_mask
from edgeq.passes.fold_attention_scale import fold_attention_scale
from edgeq.passes.fold_constants import fold_constants
from edgeq.passes.fold_table_scale import fold_table_scale
from edgeq.passes.known_truths import known_truths
from edgeq.passes.mask_last import mask_last
from edgeq.passes.part_products import part_products

RNG = np.random.default_rng(1)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def with_inputs(
    nodes: list[Node], constants: dict[str, np.ndarray], ports: dict[str, tuple[int, list[object]]]
) -> onnx.ModelProto:
    """Make a model with several inputs, and the float output y."""
    made = [helper.make_node(op, inputs, [output], name=f"node_{output}", **more) for op, inputs, output, more in nodes]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in ports.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    proto = helper.make_graph(made, "g", inputs, [output], stored)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def test_what_depends_on_no_input_is_computed_once() -> None:
    nodes: list[Node] = [("Add", ["w", "one"], "gain", {}), ("Mul", ["x", "gain"], "y", {})]
    model = graph(nodes, {"w": array(4), "one": np.array(1, np.float32)}, ["n", 4])
    new, done = rewritten(model, fold_constants)
    assert (done.count, operators(new)) == (1, {"Mul": 1})
    x = array(3, 4)
    np.testing.assert_array_equal(run(model, x=x), run(new, x=x))


def test_a_constant_does_not_grow() -> None:
    nodes: list[Node] = [("Add", ["w", "v"], "table", {}), ("Add", ["x", "table"], "y", {})]
    _, done = rewritten(graph(nodes, {"w": array(4, 1), "v": array(1, 4)}, [4, 4]), fold_constants)
    assert done.count == 0 and "larger than what it reads" in done.near_misses[0]


@pytest.mark.parametrize("bias", [True, False])
def test_joint_products_are_taken_apart(bias: bool) -> None:
    nodes: list[Node] = [("MatMul", ["x", "w"], "p", {})]
    nodes += [("Add", ["p", "b"], "s", {})] if bias else []
    model = graph(nodes, {"w": array(4, 6), "b": array(6)}, [2, "n", 4], "s" if bias else "p")
    split = helper.make_node("Split", ["s" if bias else "p"], ["gate", "value"], name="parts", axis=2, num_outputs=2)
    model.graph.node.extend([split, helper.make_node("Mul", ["gate", "value"], ["y"], name="gated")])
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    new, done = rewritten(model, part_products)
    assert done.count == 1 and operators(new) == {"MatMul": 2, "Mul": 1, **({"Add": 2} if bias else {})}
    x = array(2, 5, 4)
    np.testing.assert_allclose(run(model, x=x), run(new, x=x), atol=1e-6)


def test_query_key_and_value_get_weights_of_their_own() -> None:
    nodes: list[Node] = [("MatMul", ["x", "w"], "p", {}), ("Reshape", ["p", "shape"], "heads", {})]
    for place, name in enumerate("qkv"):
        nodes += [
            ("Slice", ["heads", f"from{place}", f"from{place + 1}", "axis"], f"{name}5", {}),
            ("Squeeze", [f"{name}5", "axis"], name, {}),
        ]
    nodes += [("Mul", ["q", "k"], "qk", {}), ("Add", ["qk", "v"], "y", {})]
    constants = {f"from{place}": numbers(place) for place in range(4)}
    constants |= {"w": array(8, 24), "shape": numbers(0, 0, 3, 2, 4), "axis": numbers(2)}
    model = graph(nodes, constants, [2, 5, 8])
    new, done = rewritten(model, part_products)
    assert done.count == 1 and operators(new) == {"MatMul": 3, "Reshape": 3, "Mul": 1, "Add": 1}
    x = array(2, 5, 8)
    np.testing.assert_allclose(run(model, x=x), run(new, x=x), atol=1e-5)


def test_a_product_that_is_also_read_whole_stays() -> None:
    nodes: list[Node] = [
        ("MatMul", ["x", "w"], "p", {}),
        ("Slice", ["p", "zero", "two", "last"], "a", {}),
        ("ReduceSum", ["p", "last"], "total", {"keepdims": 1}),
        ("Add", ["a", "total"], "y", {}),
    ]
    constants = {"w": array(4, 6), "zero": numbers(0), "two": numbers(2), "last": numbers(-1)}
    new, done = rewritten(graph(nodes, constants, [2, 3, 4]), part_products)
    assert done.count == 0 and operators(new)["MatMul"] == 1


def local_attention(causal: bool) -> onnx.ModelProto:
    """A mask as transformers 5 writes it: positions compared, and padding gathered."""
    nodes: list[Node] = [
        ("Shape", ["attention_mask"], "size", {"start": 1, "end": 2}),
        ("Squeeze", ["size"], "n", {}),
        ("Range", ["zero", "n", "one"], "places", {}),
        ("Unsqueeze", ["places", "axes013"], "rows", {}),
        ("Unsqueeze", ["places", "axes012"], "columns", {}),
        ("GreaterOrEqual", ["rows", "zero"], "counted", {}),
        ("LessOrEqual", ["columns", "rows"], "before", {}),
        ("Cast", ["attention_mask"], "kept", {"to": TensorProto.BOOL}),
        ("Unsqueeze", ["kept", "axes12"], "padding", {}),
        ("And", ["before" if causal else "counted", "counted"], "limits", {}),
        ("And", ["limits", "padding"], "allowed", {}),
        ("Where", ["allowed", "nothing", "far"], "bias", {}),
        ("Add", ["scores", "bias"], "masked", {}),
        ("Softmax", ["masked"], "y", {"axis": -1}),
    ]
    constants = {
        "zero": np.array(0, np.int64), "one": np.array(1, np.int64), "axes013": numbers(0, 1, 3),
        "axes012": numbers(0, 1, 2), "axes12": numbers(1, 2), "nothing": np.array(0, np.float32),
        "far": np.array(np.finfo(np.float32).min, np.float32),
    }  # fmt: skip
    ports = {
        "attention_mask": (TensorProto.INT64, ["batch", "sequence"]),
        "scores": (TensorProto.FLOAT, ["batch", 2, "sequence", "sequence"]),
    }
    return with_inputs(nodes, constants, ports)


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_keeps_where_positions_may_look(causal: bool) -> None:
    model = local_attention(causal)
    new, done = rewritten(model, finite_mask)
    assert done.count == 1 and ("LessOrEqual" in operators(new)) is causal and "Where" not in operators(new)
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int64)
    scores = array(2, 2, 4, 4)
    np.testing.assert_allclose(
        run(model, attention_mask=mask, scores=scores), run(new, attention_mask=mask, scores=scores), atol=1e-6
    )


def test_conditions_that_decide_nothing_are_dropped() -> None:
    nodes: list[Node] = [
        ("Less", ["x", "one"], "low", {}),
        ("Or", ["low", "never"], "either", {}),
        ("And", ["either", "always"], "both", {}),
        ("Where", ["both", "x", "one"], "y", {}),
    ]
    constants = {"one": np.array(1, np.float32), "never": np.array(False), "always": np.array(True)}
    model = graph(nodes, constants, ["n", 4])
    new, done = rewritten(model, known_truths)
    assert (done.count, operators(new)) == (2, {"Less": 1, "Where": 1})
    x = array(3, 4)
    np.testing.assert_array_equal(run(model, x=x), run(new, x=x))
    swapped = graph([nodes[0], ("Or", ["low", "always"], "both", {}), nodes[3]], constants, ["n", 4])
    assert rewritten(swapped, known_truths)[1].count == 0  # that is always true, and no operand


def test_the_mask_is_added_last() -> None:
    nodes: list[Node] = [
        ("Mul", ["shifted", "attention_mask_size"], "mask", {}),
        ("Add", ["bias", "mask"], "both", {}),
        ("Add", ["x", "both"], "masked", {}),
        ("Softmax", ["masked"], "y", {"axis": -1}),
    ]
    constants = {"attention_mask_size": np.array(50, np.float32), "bias": array(4, 4)}
    ports = {"x": (TensorProto.FLOAT, [2, 4, 4]), "shifted": (TensorProto.FLOAT, [2, 1, 4])}
    model = with_inputs(nodes, constants, ports)
    roles.note(model.graph.node[0], Role.ATTENTION_MASK)
    new, done = rewritten(model, mask_last)
    (last,) = (node for node in new.graph.node if node.name == "node_masked")
    assert done.count == 1 and last.input[1] == "mask"
    feeds = {"x": array(2, 4, 4), "shifted": -np.eye(4, dtype=np.float32)[:2, None]}
    np.testing.assert_allclose(run(model, **feeds), run(new, **feeds), atol=1e-6)


def test_the_scale_of_embeddings_moves_into_their_table() -> None:
    nodes: list[Node] = [("Gather", ["table", "ids"], "rows", {}), ("Mul", ["rows", "eight"], "y", {})]
    constants = {"table": array(9, 4), "eight": np.array(8, np.float32)}
    model = with_inputs(nodes, constants, {"ids": (TensorProto.INT64, ["batch", "sequence"])})
    new, done = rewritten(model, fold_table_scale)
    assert (done.count, operators(new)) == (1, {"Gather": 1})
    ids = numbers(3, 1, 8)[None]
    np.testing.assert_array_equal(run(model, ids=ids), run(new, ids=ids))


def test_a_reshape_to_the_same_shape_is_dropped() -> None:
    model = graph(
        [("Reshape", ["x", "shape"], "flat", {}), ("Neg", ["flat"], "y", {})], {"shape": numbers(2, 4)}, [2, 4]
    )
    assert rewritten(model, drop_reshape)[1].count == 1
    other = graph(
        [("Reshape", ["x", "shape"], "flat", {}), ("Neg", ["flat"], "y", {})], {"shape": numbers(4, 2)}, [2, 4]
    )
    assert rewritten(other, drop_reshape)[1].count == 0


def rotated_attention(normalised: bool = False) -> onnx.ModelProto:
    """Scores of queries that are turned by position, and scaled behind the product."""
    start: list[Node] = [("MatMul", ["x", "wq"], "q", {})]
    if normalised:
        start += [
            ("Mul", ["q", "q"], "squares", {}),
            ("ReduceMean", ["squares", "last"], "mean", {"keepdims": 1}),
            ("Add", ["mean", "eps"], "shifted", {}),
            ("Sqrt", ["shifted"], "root", {}),
            ("Reciprocal", ["root"], "inverse", {}),
            ("Mul", ["q", "inverse"], "unit", {}),
            ("Mul", ["unit", "gain"], "gained", {}),
        ]
    query = start[-1][2]
    nodes: list[Node] = [
        *start,
        ("Mul", [query, "cos"], "straight", {}),
        ("Slice", [query, "zero", "half", "axis"], "low", {}),
        ("Slice", [query, "half", "end", "axis"], "high", {}),
        ("Neg", ["high"], "negated", {}),
        ("Concat", ["negated", "low"], "turned", {"axis": -1}),
        ("Mul", ["turned", "sin"], "across", {}),
        ("Add", ["straight", "across"], "rotated", {}),
        ("MatMul", ["x", "wk"], "k", {}),
        ("Transpose", ["k"], "kt", {"perm": [0, 2, 1]}),
        ("MatMul", ["rotated", "kt"], "scores", {}),
        ("Mul", ["scores", "factor"], "scaled", {}),
        ("Softmax", ["scaled"], "y", {"axis": -1}),
    ]
    constants = {
        "wq": array(8, 8), "wk": array(8, 8), "factor": np.array(0.25, np.float32), "zero": numbers(0),
        "half": numbers(4), "end": numbers(8), "axis": numbers(2), "cos": array(5, 8), "sin": array(5, 8),
        "last": numbers(-1), "eps": np.array(1e-6, np.float32), "gain": array(8),
    }  # fmt: skip
    return graph(nodes, constants, [2, 5, 8])


@pytest.mark.parametrize("normalised", [True, False])
def test_the_scale_passes_through_a_rotation(normalised: bool) -> None:
    model = rotated_attention(normalised)
    new, done = rewritten(model, fold_attention_scale)
    assert done.count == 1 and operators(new)["Mul"] == operators(model)["Mul"] - 1
    x = array(2, 5, 8)
    np.testing.assert_allclose(run(model, x=x), run(new, x=x), atol=1e-5)


def test_a_mean_square_is_known_by_what_it_divides_by() -> None:
    gained = ir.from_proto(rotated_attention(True)).graph.node("node_gained")
    found = root_mean_square(gained)
    assert found is not None and found.x.name == "q" and found.epsilon == pytest.approx(1e-6)
    straight = ir.from_proto(rotated_attention(True)).graph.node("node_straight")
    assert root_mean_square(straight) is None


def test_padding_rows_may_be_anything_and_others_may_not() -> None:
    from edgeq.data.tokens import Feeds

    mask = np.array([[1, 1, 0]], np.int64)
    before = {"last_hidden_state": array(1, 3, 4)}
    after = {"last_hidden_state": before["last_hidden_state"].copy()}
    after["last_hidden_state"][0, 2] = 9.0
    assert distances([before], [after], [Feeds(mask, mask)]) == {"last_hidden_state": 0.0}
    after["last_hidden_state"][0, 1] += 1.0
    assert distances([before], [after], [Feeds(mask, mask)])["last_hidden_state"] > 0.1
