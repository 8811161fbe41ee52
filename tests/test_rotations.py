"""A rotation by position becomes two products and one lookup of channels, whatever operators it is written in."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_passes import Node, operators

from edgeq.data.tokens import Feeds
from edgeq.graph.edit import Rewrites
from edgeq.graph.float_session import FloatSession
from edgeq.quantization.rewrites.rotate_half_by_gather import rotate_half_by_gather
from edgeq.quantization.rewrites.rotation_by_gather import rotation_by_gather
from edgeq.quantization.rewrites.rotation_parts import MOVED

LANES, HEADS = 8, 2
RNG = np.random.default_rng(5)


def halves(x: str, lanes: int = LANES) -> list[Node]:
    """Split x in two along its last axis."""
    return [("Slice", [x, "at_0", f"at_{lanes // 2}", "last"], "a", {}),
            ("Slice", [x, f"at_{lanes // 2}", f"at_{lanes}", "last"], "b", {})]  # fmt: skip


EVERY_OTHER: list[Node] = [
    ("Slice", ["x", "at_0", "at_8", "last", "at_2"], "a", {}),
    ("Slice", ["x", "at_1", "at_8", "last", "at_2"], "b", {}),
]  # fmt: skip
STACKED: list[Node] = [
    ("Unsqueeze", ["p", "last"], "p5", {}), ("Unsqueeze", ["q", "last"], "q5", {}),
    ("Concat", ["p5", "q5"], "pairs", {"axis": -1}), ("Reshape", ["pairs", "as_before"], "joined", {}),
]  # fmt: skip
SUMMED: list[Node] = [
    ("Mul", ["x", "cos"], "straight", {}), ("Mul", ["joined", "sin"], "crossed", {}),
    ("Add", ["straight", "crossed"], "y", {}),
]  # fmt: skip
COMPLEX: list[Node] = [
    ("Mul", ["a", "few_cos"], "ac", {}), ("Mul", ["b", "few_sin"], "bs", {}), ("Sub", ["ac", "bs"], "p", {}),
    ("Mul", ["a", "few_sin"], "as", {}), ("Mul", ["b", "few_cos"], "bc", {}), ("Add", ["as", "bc"], "q", {}),
]  # fmt: skip
NEGATED: list[Node] = [("Neg", ["b"], "p", {}), ("Identity", ["a"], "q", {})]
JOINED: Node = ("Concat", ["p", "q"], "joined", {"axis": -1})
FORMS: dict[str, list[Node]] = {
    "split": [("Split", ["x", "two_halves"], "a,b", {"axis": -1}), *NEGATED, JOINED, *SUMMED],
    "every other": [*EVERY_OTHER, *NEGATED, *STACKED, *SUMMED],
    "subtracted": [*halves("x"), ("Sub", ["zero", "b"], "p", {}), ("Identity", ["a"], "q", {}), JOINED, *SUMMED],
    "times minus one": [*halves("x"), ("Mul", ["b", "minus"], "p", {}), ("Identity", ["a"], "q", {}), JOINED, *SUMMED],
    "complex": [*EVERY_OTHER, *COMPLEX, *STACKED[:3], ("Reshape", ["pairs", "as_before"], "y", {})],
    "complex halves": [*halves("x"), *COMPLEX, ("Concat", ["p", "q"], "y", {"axis": -1})],
    "complex view": [
        ("Reshape", ["x", "in_pairs"], "x5", {}),
        ("Gather", ["x5", "first"], "a", {"axis": -1}), ("Gather", ["x5", "second"], "b", {"axis": -1}),
        *COMPLEX, *STACKED[:3], ("Reshape", ["pairs", "as_before"], "y", {}),
    ],
    "matrix": [("MatMul", ["x", "exchange"], "joined", {}), *SUMMED],
    "partial": [
        ("Slice", ["x", "at_0", "at_4", "last"], "turning", {}), ("Slice", ["x", "at_4", "at_8", "last"], "still", {}),
        *halves("turning", 4), *NEGATED, JOINED, ("Mul", ["turning", "few_cos"], "straight", {}),
        ("Mul", ["joined", "few_sin"], "crossed", {}), ("Add", ["straight", "crossed"], "turned", {}),
        ("Concat", ["turned", "still"], "y", {"axis": -1}),
    ],
    "one sign wrong": [*halves("x"), ("Mul", ["b", "signs"], "p", {}), ("Identity", ["a"], "q", {}), JOINED, *SUMMED],
    "shifted by one": [
        ("Slice", ["x", "at_1", "at_8", "last"], "b", {}), ("Slice", ["x", "at_0", "at_1", "last"], "a", {}),
        *NEGATED, JOINED, *SUMMED,
    ],
}  # fmt: skip


def rotating(form: list[Node]) -> onnx.ModelProto:
    """Make queries out of ids, rotate them by position, and multiply them with themselves."""
    nodes: list[Node] = [
        ("Gather", ["table", "input_ids"], "rows", {}), ("Reshape", ["rows", "to_heads"], "heads", {}),
        ("Transpose", ["heads"], "x", {"perm": [0, 2, 1, 3]}),
        ("Shape", ["input_ids"], "size", {"start": 1, "end": 2}), ("Squeeze", ["size"], "length", {}),
        ("Range", ["none", "length", "step"], "places", {}), ("Cast", ["places"], "numbers", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["numbers", "at_1"], "column", {}),
        ("Mul", ["column", "few"], "few_angles", {}), ("Mul", ["column", "many"], "angles", {}),
        ("Cos", ["few_angles"], "few_cos", {}), ("Sin", ["few_angles"], "few_sin", {}),
        ("Cos", ["angles"], "cos", {}), ("Sin", ["angles"], "sin", {}),
        *form,
        ("ReduceMean", ["y", "heads_axis"], "sentence_embedding", {"keepdims": 0}),
    ]  # fmt: skip
    exchange = np.zeros((LANES, LANES), np.float32)
    for lane in range(0, LANES, 2):
        exchange[lane + 1, lane], exchange[lane, lane + 1] = -1, 1
    constants: dict[str, np.ndarray] = {
        "table": RNG.standard_normal((20, HEADS * LANES)).astype(np.float32),
        "to_heads": np.array([0, 0, HEADS, LANES]),
        "none": np.array(0), "step": np.array(1), "last": np.array([-1]), "as_before": np.array([0, 0, -1, LANES]),
        "in_pairs": np.array([0, 0, 0, LANES // 2, 2]), "two_halves": np.array([4, 4]), "heads_axis": np.array([1]),
        "first": np.array(0), "second": np.array(1), "exchange": exchange, "zero": np.array(0, np.float32),
        "backwards": np.array([3, 2, 1, 0]), "gains": np.array([1, 2], np.float32).reshape(1, HEADS, 1, 1),
        "minus": np.array(-1, np.float32), "signs": np.array([-1, -1, 1, -1], np.float32),
        "few": RNG.standard_normal(LANES // 2).astype(np.float32),
        "many": RNG.standard_normal(LANES).astype(np.float32),
        **{f"at_{place}": np.array([place]) for place in (0, 1, 2, 4, 8)},
    }  # fmt: skip
    made = [helper.make_node(op, ins, out.split(","), name=f"node_{out}", **more) for op, ins, out, more in nodes]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(made, "g", [ids], [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Rewrites]:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    edited = ir.from_proto(model)
    done = rotation_by_gather(edited)
    RemoveUnusedNodesPass()(edited)
    proto = ir.to_proto(edited)
    onnx.checker.check_model(proto, full_check=True)
    return proto, done


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_rotation_gives_the_same_numbers_by_one_lookup(form: str) -> None:
    model = rotating(FORMS[form])
    assert rotate_half_by_gather(ir.from_proto(model)).count == 0  # which knows one form
    new, done = rewritten(model)
    assert done == Rewrites(1)
    graph = ir.from_proto(new).graph
    turned = next(node for node in graph if node.name.endswith("/turned"))
    (product,) = [use.node for use in turned.outputs[0].uses()]
    (total,) = [use.node for use in product.outputs[0].uses()]
    assert (product.op_type, total.op_type) == ("Mul", "Add")
    assert {use.node.op_type for use in turned.inputs[0].uses()} == {"Gather", "Mul"}  # no other operator reads x
    ids = np.array([[1, 5, 9, 13, 2], [3, 3, 7, 0, 19]])
    for rows in (ids, ids[:1, :3]):
        before, after = (
            FloatSession.of(each, optimize=False)(Feeds(rows, np.ones_like(rows))) for each in (model, new)
        )
        np.testing.assert_array_equal(before, after)


def test_three_channels_in_one_are_no_rotation_and_say_so() -> None:
    mixed: list[Node] = [*halves("x"), ("Neg", ["b"], "n", {}), ("Gather", ["a", "backwards"], "r", {"axis": -1}),
                         ("Sub", ["n", "r"], "p", {}), ("Identity", ["a"], "q", {}), JOINED, *SUMMED]  # fmt: skip
    new, done = rewritten(rotating(mixed))
    assert done.count == 0 and "more than itself and one other" in done.near_misses[0]
    assert set(operators(new)) & MOVED == {"Concat", "Neg", "Sub"}


def test_factors_that_differ_between_heads_say_so() -> None:
    scaled: list[Node] = [*SUMMED[:1], ("Mul", ["joined", "gains"], "louder", {})]
    crossed: list[Node] = [("Mul", ["louder", "sin"], "crossed", {}), SUMMED[2]]
    _, done = rewritten(rotating([*FORMS["split"][:-3], *scaled, *crossed]))
    assert done.count == 0 and "by factors that differ between heads" in done.near_misses[0]


def test_equal_rotations_share_their_tables() -> None:
    once = FORMS["every other"]
    again: list[Node] = [
        (op, [name if name in ("x", "cos", "sin", "last", "as_before") or name.startswith("at_") else f"{name}_k"
              for name in inputs], f"{out}_k", more) for op, inputs, out, more in once
    ]  # fmt: skip
    both: list[Node] = [(op, inputs, "y_q" if out == "y" else out, more) for op, inputs, out, more in once]
    new, done = rewritten(rotating([*both, *again, ("Max", ["y_q", "y_k"], "y", {})]))
    assert done.count == 2
    assert operators(new)["Expand"] == 2  # ones in either half of the lanes, once for both


def test_what_another_rewrite_has_replaced_is_left_alone() -> None:
    halved: list[Node] = [*halves("x"), *NEGATED, JOINED, *SUMMED]
    halved[-4] = ("Concat", ["p", "a"], "joined", {"axis": -1})
    edited = ir.from_proto(rotating(halved))
    assert rotate_half_by_gather(edited).count == 1  # its Neg and Concat stand in the graph until they are dropped
    assert rotation_by_gather(edited) == Rewrites(0)
