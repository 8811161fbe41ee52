"""A mask that is joined with a bias by positions, in any form and for any number of layers, is taken apart again."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_passes import Node, operators

from edgeq.data.tokens import Feeds
from edgeq.graph import roles
from edgeq.graph.dialect import LARGEST_CONSTANT
from edgeq.graph.float_session import FloatSession
from edgeq.graph.roles import Role
from edgeq.passes.apply import Pass, apply_to, without_statistics
from edgeq.passes.finite_mask import finite_mask
from edgeq.passes.mask_last import mask_last
from edgeq.passes.masked_positions import masked_positions
from edgeq.passes.recover_padding_mask import recover_padding_mask
from edgeq.records import PassReport

MIN = float(np.finfo(np.float32).min)
PASSES: tuple[Pass[object], ...] = tuple(
    map(without_statistics, (finite_mask, recover_padding_mask, masked_positions, mask_last))
)
FEEDS = tuple(
    Feeds(ids, (ids > 0).astype(np.int64))
    for ids in (np.array([[3, 1, 2]]), np.array([[1, 2, 3, 1, 0, 0], [2, 0, 0, 0, 0, 0], [3, 1, 2, 2, 1, 3]]))
)
BEFORE: list[Node] = [
    ("Cast", ["input_ids"], "words", {"to": TensorProto.FLOAT}),
    ("Unsqueeze", ["words", "axes12"], "keys", {}),
    ("Unsqueeze", ["words", "axes13"], "tokens_0", {}),
    ("Shape", ["input_ids"], "size", {"start": 1, "end": 2}),
    ("Squeeze", ["size"], "length", {}),
    ("Range", ["first", "length", "step"], "places", {}),
    ("Unsqueeze", ["places", "axes013"], "queries_at", {}),
    ("Unsqueeze", ["places", "axes012"], "keys_at", {}),
    ("Sub", ["keys_at", "queries_at"], "apart", {}),
    ("Cast", ["apart"], "apart_f", {"to": TensorProto.FLOAT}),
    ("Abs", ["apart_f"], "distance", {}),
    ("Mul", ["distance", "slopes"], "bias", {}),
    ("LessOrEqual", ["keys_at", "queries_at"], "earlier", {}),
    ("Unsqueeze", ["attention_mask", "axes12"], "kept", {}),
    ("Cast", ["kept"], "kept_f", {"to": TensorProto.FLOAT}),
    ("Cast", ["kept"], "is_kept", {"to": TensorProto.BOOL}),
    ("Not", ["is_kept"], "is_padding", {}),
    ("Sub", ["one", "kept_f"], "padding", {}),
    ("And", ["earlier", "is_kept"], "seen", {}),
    ("Not", ["seen"], "is_unseen", {}),
]
SHUT: dict[str, list[Node]] = {
    "product": [("Mul", ["padding", "low"], "shut", {})],
    "choice": [("Where", ["is_kept", "none", "low"], "shut", {})],
}
JOINED: dict[str, list[Node]] = {  # what makes `added` of `bias` and `shut`
    "mask first": [("Add", ["shut", "bias"], "added", {})],
    "mask last": [("Add", ["bias", "shut"], "added", {})],
    "two biases": [("Add", ["shut", "bias"], "once", {}), ("Add", ["once", "distance"], "added", {})],
    "filled": [("Where", ["is_kept", "bias", "low"], "added", {})],
    "causal": [("Where", ["seen", "bias", "low"], "added", {})],
    "causal and padding": [
        ("Where", ["earlier", "none", "low"], "later", {}), ("Add", ["later", "shut"], "both", {}),
        ("Max", ["both", "low"], "cut", {}), ("Add", ["cut", "bias"], "added", {}),
    ],
    "counted": [
        ("CumSum", ["attention_mask", "axis1"], "counts", {}), ("Mul", ["counts", "attention_mask"], "counted", {}),
        ("Unsqueeze", ["counted", "axes12"], "counted4", {}),
        ("Cast", ["counted4"], "counted_f", {"to": TensorProto.FLOAT}),
        ("Mul", ["counted_f", "slopes"], "alibi", {}), ("Add", ["alibi", "shut"], "added", {}),
    ],
    "square": [
        ("Transpose", ["kept_f"], "rows", {"perm": [0, 1, 3, 2]}), ("Mul", ["rows", "kept_f"], "pairs", {}),
        ("Sub", ["one", "pairs"], "unpaired", {}), ("Mul", ["unpaired", "low"], "shut4", {}),
        ("Add", ["bias", "shut4"], "added", {}),
    ],
}  # fmt: skip
FEW = {"tokens": [("ReduceSum", ["kept_f"], "many", {"keepdims": 1}), ("Mul", ["bias", "many"], "longer", {}),
                  ("Add", ["longer", "shut"], "added", {})]}  # fmt: skip


def attention(joined: list[Node], shut: str = "product", low: float = MIN, layers: int = 2) -> onnx.ModelProto:
    """Make tokens of one channel attend to each other, with what is made once added to the scores of each layer."""
    nodes = [*BEFORE, *SHUT[shut], *joined]
    for layer in range(layers):
        nodes += [
            ("Mul", ["keys", f"tokens_{layer}"], f"scores_{layer}", {}),
            ("Add", [f"scores_{layer}", "added"], f"masked_{layer}", {}),
            ("Softmax", [f"masked_{layer}"], f"shares_{layer}", {"axis": -1}),
            ("MatMul", [f"shares_{layer}", f"tokens_{layer}"], f"tokens_{layer + 1}", {}),
        ]
    nodes += [
        ("MatMul", ["kept_f", f"tokens_{layers}"], "pooled", {}),
        ("Squeeze", ["pooled", "axes23"], "sentence_embedding", {}),
    ]
    constants: dict[str, np.ndarray] = {
        "axes12": np.array([1, 2]), "axes13": np.array([1, 3]), "axes013": np.array([0, 1, 3]), "axis1": np.array(1),
        "axes012": np.array([0, 1, 2]), "axes23": np.array([2, 3]), "first": np.array(0), "step": np.array(1),
        "slopes": np.array([[[-0.5]], [[-0.125]]], np.float32), "low": np.array(low, np.float32),
        "one": np.array(1, np.float32), "none": np.array(0, np.float32),
    }  # fmt: skip
    made = [helper.make_node(op, inputs, [out], name=f"node_{out}", **more) for op, inputs, out, more in nodes]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(made, "g", ports, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    new, reports = apply_to(model, FEEDS, PASSES, None)
    return ir.to_proto(new), reports


def assert_is_apart(model: onnx.ModelProto, layers: int) -> None:
    """The one mask is finite, and each softmax reads a sum whose last term it is."""
    new, _ = rewritten(model)
    stored = [numpy_helper.to_array(item) for item in new.graph.initializer]
    assert all(np.abs(array).max() < LARGEST_CONSTANT for array in stored if array.dtype == np.float32)
    made = {name: node for node in new.graph.node for name in node.output}
    masks = {name for name, node in made.items() if _is_mask(node)}
    sums = [made[node.input[0]] for node in new.graph.node if node.op_type == "Softmax"]
    assert len(masks) == 1 and len(sums) == layers and {node.input[1] for node in sums} == masks
    before, after = FloatSession.of(model), FloatSession.of(new)
    for feeds in FEEDS:
        np.testing.assert_allclose(before(feeds), after(feeds), rtol=1e-6, atol=1e-6)


def _is_mask(node: onnx.NodeProto) -> bool:
    return any(item.key == roles.KEY and item.value == Role.ATTENTION_MASK for item in node.metadata_props)


@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_mask_that_is_one_with_a_bias_is_taken_apart_for_every_layer(joined: str, layers: int) -> None:
    assert_is_apart(attention(JOINED[joined], layers=layers), layers)


@pytest.mark.parametrize("joined", ["mask first", "counted"])
@pytest.mark.parametrize(
    ("shut", "low"), [("product", -1e4), ("product", -1e9), ("product", -65504.0), ("choice", -np.inf), ("choice", MIN)]
)
def test_whatever_shuts_padding_is_one_finite_mask(joined: str, shut: str, low: float) -> None:
    assert_is_apart(attention(JOINED[joined], shut, low), 2)


def test_two_joined_biases_share_the_mask() -> None:
    model = attention([("Add", ["shut", "bias"], "added", {}), ("Add", ["shut", "distance"], "other", {})])
    model.graph.node[[node.name for node in model.graph.node].index("node_masked_1")].input[1] = "other"
    assert_is_apart(model, 2)


@pytest.mark.parametrize("condition", ["is_padding", "is_unseen"])
def test_scores_are_filled_by_padding_alone_or_by_positions_too(condition: str) -> None:
    model = attention(JOINED["mask first"])
    for node in model.graph.node:
        if node.name.startswith("node_masked"):
            node.op_type = "Where"
            node.input[:] = [condition, "low", node.input[0]]
    new, _ = rewritten(model)
    assert "Where" not in operators(new) and ("LessOrEqual" in operators(new)) is (condition == "is_unseen")


def test_a_bias_that_the_mask_changes_for_tokens_keeps_its_arithmetic() -> None:
    _, reports = rewritten(attention(FEW["tokens"]))
    by_name = {each.name: each for each in reports}
    assert by_name["masked_positions"].rewrites == 0 and by_name["mask_last"].rewrites == 2
    assert any("changes them where a token counts" in why for why in by_name["masked_positions"].near_misses)


def test_a_sum_that_something_else_reads_stays_for_that_reader() -> None:
    model = attention([*JOINED["mask first"], ("ReduceMin", ["added"], "least", {"keepdims": 0})])
    model.graph.output.append(helper.make_tensor_value_info("least", TensorProto.FLOAT, []))
    new, reports = rewritten(model)
    assert {each.name: each.rewrites for each in reports}["masked_positions"] == 2
    found = FloatSession.of(new).outputs(FEEDS[1])["least"]
    assert found == FloatSession.of(model).outputs(FEEDS[1])["least"] < -1e30
