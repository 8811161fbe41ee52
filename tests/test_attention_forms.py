"""What encoders do around attention, as integer-only runtimes can: the FP32 function stays, codes are only moved."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from test_passes import Node, graph, operators, run
from test_passes_text import array, numbers, with_inputs

from edgeq.calibration.statistics import Statistics
from edgeq.errors import EdgeqError
from edgeq.graph import roles
from edgeq.graph.evaluate import computed
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.add_zero_bias import add_zero_bias
from edgeq.quantization.rewrites.repeat_kv_by_gather import repeat_kv_by_gather
from edgeq.quantization.rewrites.rotate_half_by_gather import rotate_half_by_gather
from edgeq.quantization.rewrites.slice_counted_positions import slice_counted_positions
from edgeq.quantization.rewrites.split_outlier_weights import split_outlier_weights


def after(model: onnx.ModelProto, rewrite) -> tuple[onnx.ModelProto, int]:  # type: ignore[no-untyped-def]
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    edited = ir.from_proto(model)
    count = rewrite(edited).count
    RemoveUnusedNodesPass()(edited)
    proto = ir.to_proto(edited)
    onnx.checker.check_model(proto, full_check=True)
    return proto, count


def rotation(swapped: bool = False) -> onnx.ModelProto:
    low, high = (["zero", "half"], ["half", "end"])
    nodes: list[Node] = [
        ("Shape", ["x"], "size", {"start": 1, "end": 2}),
        ("Squeeze", ["size"], "n", {}),
        ("Range", ["none", "n", "one"], "places", {}),
        ("Cast", ["places"], "numbers", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["numbers", "one1"], "column", {}),
        ("Mul", ["column", "frequencies"], "angle", {}),
        ("Sin", ["angle"], "sin", {}),
        ("Slice", ["x", *(low if swapped else high), "axis"], "first", {}),
        ("Slice", ["x", *(high if swapped else low), "axis"], "second", {}),
        ("Neg", ["first"], "negated", {}),
        ("Concat", ["negated", "second"], "turned", {"axis": -1}),
        ("Mul", ["turned", "sin"], "y", {}),
    ]
    constants = {
        "zero": numbers(0), "half": numbers(4), "end": numbers(8), "axis": numbers(2), "one1": numbers(1),
        "none": np.array(0, np.int64), "one": np.array(1, np.int64), "frequencies": array(8),
    }  # fmt: skip
    return graph(nodes, constants, [2, 5, 8])


def test_halves_change_places_in_one_lookup() -> None:
    model = rotation()
    new, count = after(model, rotate_half_by_gather)
    assert count == 1 and operators(new)["Gather"] == 1 and not {"Neg", "Concat", "Slice"} & set(operators(new))
    x = array(2, 5, 8)
    np.testing.assert_allclose(run(model, x=x), run(new, x=x), atol=1e-6)


def test_halves_that_stay_where_they_are_are_no_rotation() -> None:
    assert after(rotation(swapped=True), rotate_half_by_gather)[1] == 0


def test_shared_heads_are_looked_up() -> None:
    nodes: list[Node] = [
        ("Unsqueeze", ["x", "two"], "spread", {}),
        ("Expand", ["spread", "times"], "wide", {}),
        ("Reshape", ["wide", "shape"], "y", {}),
    ]
    constants = {"two": numbers(2), "times": numbers(1, 2, 3, 5, 4), "shape": numbers(0, 6, -1, 4)}
    model = graph(nodes, constants, [1, 2, 5, 4])
    new, count = after(model, repeat_kv_by_gather)
    assert count == 1 and operators(new) == {"Gather": 1}
    x = array(1, 2, 5, 4)
    np.testing.assert_array_equal(run(model, x=x), run(new, x=x))


def counted(step: int = 1) -> onnx.ModelProto:
    nodes: list[Node] = [
        ("Equal", ["input_ids", "padding"], "is_padding", {}),
        ("Not", ["is_padding"], "is_token", {}),
        ("Cast", ["is_token"], "ones", {"to": TensorProto.INT64}),
        ("CumSum", ["ones", "axis"], "seen", {}),
        ("Mul", ["seen", "step"], "steps", {}),
        ("Add", ["steps", "padding"], "places", {}),
        ("Gather", ["table", "places"], "y", {}),
    ]
    constants = {
        "padding": np.array(1, np.int64), "axis": np.array(1, np.int64), "step": np.array(step, np.int64),
        "table": array(40, 4),
    }  # fmt: skip
    return with_inputs(nodes, constants, {"input_ids": (TensorProto.INT64, ["batch", "sequence"])})


def test_counted_positions_become_rows() -> None:
    model = counted()
    new, count = after(model, slice_counted_positions)
    assert count == 1 and "CumSum" not in operators(new)
    ids = np.array([[5, 7, 9, 4]], np.int64)
    np.testing.assert_array_equal(run(model, input_ids=ids), run(new, input_ids=ids))


def test_positions_with_gaps_are_counted_on() -> None:
    assert after(counted(step=2), slice_counted_positions)[1] == 0


def test_a_product_without_bias_gets_one_of_zeros() -> None:
    model = graph([("MatMul", ["x", "w"], "p", {}), ("Tanh", ["p"], "y", {})], {"w": array(4, 6)}, [2, 3, 4])
    new, count = after(model, add_zero_bias)
    assert count == 1 and operators(new) == {"MatMul": 1, "Add": 1, "Tanh": 1}
    x = array(2, 3, 4)
    np.testing.assert_array_equal(run(model, x=x), run(new, x=x))
    assert after(new, add_zero_bias)[1] == 0  # it has one


def test_a_value_is_computed_from_what_it_follows_from_only() -> None:
    model = ir.from_proto(counted())
    places = next(node for node in model.graph if node.name == "node_places").outputs[0]
    found = computed(places, {"input_ids": np.array([[5, 1, 6]], np.int64)})
    np.testing.assert_array_equal(found, [[2, 2, 3]])
    with pytest.raises(EdgeqError, match="does not follow"):
        computed(places, {"attention_mask": np.ones((1, 3), np.int64)})


@pytest.mark.parametrize("dominates", [True, False])
def test_a_dominant_outlier_branch_gets_16_bit_weights(dominates: bool) -> None:
    nodes: list[Node] = [
        ("MatMul", ["x", "w"], "block", {}),
        ("MatMul", ["x", "few"], "h", {}),
        ("Relu", ["h"], "a", {}),
        ("MatMul", ["a", "back"], "s", {}),
        ("Add", ["block", "s"], "total", {}),
        ("Neg", ["total"], "y", {}),
    ]
    model = ir.from_proto(graph(nodes, {"w": array(4, 4), "few": array(4, 3), "back": array(3, 4)}, [2, 3, 4]))
    for node in model.graph:
        if node.name in ("node_h", "node_a", "node_s"):
            roles.give(node, Role.OUTLIER_BRANCH)
        if node.name == "node_total":
            roles.give(node, Role.OUTLIER_SUM)
    before = ir.to_proto(model)
    large = np.full(4, 100.0 if dominates else 1.0, np.float32)
    one, three = np.ones(4, np.float32), np.ones(3, np.float32)
    observed = {
        "block": Statistics(-one, one), "s": Statistics(-large, large), "x": Statistics(-one, one),
        "h": Statistics(-three, three), "a": Statistics(0 * three, three),
    }  # fmt: skip
    assert split_outlier_weights(model, observed, 8).count == (2 if dominates else 0)
    new = ir.to_proto(model)
    onnx.checker.check_model(new, full_check=True)
    x = array(2, 3, 4)
    np.testing.assert_allclose(run(before, x=x), run(new, x=x), atol=1e-5)
