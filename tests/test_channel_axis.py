"""The axis of the channels follows from what a graph does; 1 x 1 convolutions become products; Transposes go."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from test_passes import Node, graph, operators, rewritten, run
from test_passes_text import array, numbers, with_inputs

from edgeq.calibration.observe import observe
from edgeq.data.batches import Batch
from edgeq.data.tokens import Feeds
from edgeq.graph import channel_axis
from edgeq.passes.fold_batch_normalization import fold_batch_normalization
from edgeq.passes.pointwise_product import pointwise_product
from edgeq.passes.tokens_before_channels import tokens_before_channels
from edgeq.quantization.rewrites.where_to_min import where_to_min

WIDTH = 6
PORTS: dict[str, tuple[int, list[object]]] = {
    name: (TensorProto.INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")
}
TABLE = {"table": array(20, WIDTH)}
ENTRY: list[Node] = [
    ("Gather", ["table", "input_ids"], "rows", {}),
    ("Transpose", ["rows"], "x", {"perm": [0, 2, 1]}),
]
MASK: list[Node] = [
    ("Cast", ["attention_mask"], "numbers", {"to": TensorProto.FLOAT}),
    ("Unsqueeze", ["numbers", "one"], "mask", {}),
    ("Mul", ["z", "mask"], "masked", {}),
]
FEED = {
    "input_ids": np.array([[3, 4, 5, 6], [7, 8, 9, 0]], np.int64),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64),
}


def text(nodes: list[Node], **constants: np.ndarray) -> onnx.ModelProto:
    model = with_inputs([*ENTRY, *nodes], {**TABLE, **constants}, PORTS)
    used = {name for node in model.graph.node for name in node.input}
    for item in [item for item in model.graph.input if item.name not in used]:
        model.graph.input.remove(item)
    return model


def check(model: onnx.ModelProto, new: onnx.ModelProto) -> None:
    feeds = {item.name: FEED[item.name] for item in model.graph.input}
    np.testing.assert_allclose(run(model, **feeds), run(new, **feeds), atol=1e-6)


# 1 x 1 convolutions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3, WIDTH])
def test_a_convolution_with_kernel_1_is_a_product(groups: int) -> None:
    model = text(
        [("Conv", ["x", "w", "b"], "y", {"group": groups, "kernel_shape": [1]})],
        w=array(WIDTH, WIDTH // groups, 1), b=array(WIDTH),
    )  # fmt: skip
    new, done = rewritten(model, pointwise_product)
    assert done.count == 1 and "Conv" not in operators(new)
    assert operators(new)["Mul" if groups == WIDTH else "MatMul"] == 1
    check(model, new)


def test_a_weight_on_the_left_is_a_product_too() -> None:
    model = text([("MatMul", ["w", "x"], "y", {})], w=array(4, WIDTH))
    new, done = rewritten(model, pointwise_product)
    assert done.count == 1 and new.graph.node[-2].input[1] == "w/product"
    check(model, new)


@pytest.mark.parametrize(
    ("attributes", "size", "why"),
    [({"pads": [1, 1]}, 3, "reads 3"), ({"strides": [2]}, 1, "leaves some"), ({"pads": [1, 0]}, 1, "adds some")],
)
def test_a_convolution_over_several_tokens_is_none(attributes: dict[str, object], size: int, why: str) -> None:
    model = text([("Conv", ["x", "w"], "y", attributes)], w=array(WIDTH, WIDTH, size))
    _, done = rewritten(model, pointwise_product)
    assert done.count == 0 and why in done.near_misses[0]


def test_maps_of_images_stay_convolutions() -> None:
    model = graph([("Conv", ["x", "w"], "y", {})], {"w": array(4, 3, 1)}, ["n", 3, 8])
    assert rewritten(model, pointwise_product)[1].count == 0


# Transposes ----------------------------------------------------------------------------------------------------------


def test_transposes_meet_and_cancel_around_masks_norms_and_tables_of_positions() -> None:
    model = text(
        [
            ("Shape", ["input_ids"], "length", {"start": 1, "end": 2}),
            ("Slice", ["positions", "zero", "length", "two"], "placed", {}),
            ("Add", ["x", "placed"], "z", {}),
            *MASK,
            ("ReduceMean", ["masked", "one"], "mean", {"keepdims": 1}),
            ("Sub", ["masked", "mean"], "centred", {}),
            ("Mul", ["centred", "gain"], "scaled", {}),
            ("Transpose", ["scaled"], "y", {"perm": [0, 2, 1]}),
        ],
        positions=array(1, WIDTH, 16), gain=array(WIDTH, 1), zero=numbers(0), one=numbers(1), two=numbers(2),
    )  # fmt: skip
    new, done = rewritten(model, tokens_before_channels)
    assert done.count > 0 and "Transpose" not in operators(new)
    check(model, new)


def test_heads_are_parted_behind_the_tokens() -> None:
    model = text(
        [
            ("Reshape", ["x", "parted"], "heads", {}),
            ("Transpose", ["heads"], "query", {"perm": [0, 1, 3, 2]}),
            ("MatMul", ["query", "heads"], "scores", {}),
            ("Softmax", ["scores"], "shares", {"axis": -1}),
            ("Transpose", ["shares"], "turned", {"perm": [0, 1, 3, 2]}),
            ("MatMul", ["heads", "turned"], "mixed", {}),
            ("Reshape", ["mixed", "joined"], "context", {}),
            ("Transpose", ["context"], "y", {"perm": [0, 2, 1]}),
        ],
        parted=numbers(0, 2, WIDTH // 2, -1), joined=numbers(0, WIDTH, -1),
    )  # fmt: skip
    new, _ = rewritten(model, tokens_before_channels)
    orders = [list(node.attribute[0].ints) for node in new.graph.node if node.op_type == "Transpose"]
    assert sorted(orders) == [[0, 2, 1, 3], [0, 2, 1, 3], [0, 2, 1, 3], [0, 2, 3, 1]]  # as every other encoder has them
    check(model, new)


def test_a_transpose_stays_before_a_convolution_over_several_tokens() -> None:
    model = text(
        [
            ("Conv", ["x", "w"], "wide", {"pads": [1, 1]}),
            ("Relu", ["wide"], "positive", {}),
            ("Add", ["x", "positive"], "z", {}),
            *MASK,
            ("ReduceMean", ["masked", "two"], "y", {"keepdims": 0}),
        ],
        w=array(WIDTH, WIDTH, 3), one=numbers(1), two=numbers(2),
    )  # fmt: skip
    new, _ = rewritten(model, tokens_before_channels)
    assert operators(new)["Transpose"] == 2 and operators(new)["Conv"] == 1
    check(model, new)


def test_keys_of_one_head_stay_turned() -> None:
    model = text([("MatMul", ["rows", "x"], "scores", {}), ("MatMul", ["scores", "rows"], "y", {})])
    assert rewritten(model, tokens_before_channels)[1].count == 0


def test_batch_normalisation_is_a_product_and_a_sum_along_axis_1() -> None:
    names = ("gain", "bias", "mean", "variance")
    rows = dict(zip(names, (array(WIDTH), array(WIDTH), array(WIDTH), np.abs(array(WIDTH)) + 0.5), strict=True))
    model = text([("BatchNormalization", ["x", *names], "y", {"epsilon": 1e-3})], **rows)
    new, done = rewritten(model, fold_batch_normalization)
    assert done.count == 1 and "BatchNormalization" not in operators(new)
    check(model, new)


# the axis ------------------------------------------------------------------------------------------------------------


def axes(model: onnx.ModelProto) -> dict[str, int]:
    return channel_axis.by_name(model)


def test_a_convolution_and_a_table_say_which_axis_it_is() -> None:
    model = text(
        [
            ("Conv", ["x", "w"], "wide", {"pads": [1, 1]}),
            ("Relu", ["wide"], "z", {}),
            *MASK,
            ("ReduceMean", ["masked", "two"], "y", {"keepdims": 0}),
        ],
        w=array(WIDTH, WIDTH, 3), one=numbers(1), two=numbers(2),
    )  # fmt: skip
    found = axes(model)
    assert {name: found[name] for name in ("rows", "x", "wide", "z", "masked", "y")} == {
        "rows": -1, "x": -2, "wide": -2, "z": -2, "masked": -2, "y": -1,
    }  # fmt: skip
    assert "mask" not in found or found["mask"] == -2


def test_it_is_carried_on_backwards_and_through_dropped_axes() -> None:
    nodes: list[Node] = [
        ("Relu", ["x"], "positive", {}),
        ("Unsqueeze", ["positive", "one"], "apart", {}),
        ("Squeeze", ["apart", "one"], "again", {}),
        ("MatMul", ["w", "again"], "y", {}),
    ]
    model = graph(nodes, {"w": array(4, WIDTH), "one": numbers(1)}, ["n", WIDTH, "t"])
    assert set(axes(model).values()) == {-2}
    assert {"x", "positive", "again", "y"} <= set(axes(model))


def test_where_two_say_different_things_there_is_none() -> None:
    nodes: list[Node] = [
        ("Relu", ["x"], "positive", {}),
        ("MatMul", ["positive", "w"], "a", {}),
        ("MatMul", ["v", "positive"], "b", {}),
        ("Add", ["a", "b"], "y", {}),
    ]
    model = graph(nodes, {"w": array(4, 4), "v": array(4, 4)}, ["n", 4, 4])
    assert "positive" not in axes(model) and "x" not in axes(model)


def test_statistics_are_of_the_channels_or_of_the_whole() -> None:
    ids = FEED["input_ids"][:1]
    batches = [Batch((row,), Feeds(ids[:, :stop], np.ones_like(ids[:, :stop]))) for row, stop in enumerate((4, 3))]
    model = text([("Conv", ["x", "w"], "wide", {"pads": [1, 1]}), ("Relu", ["wide"], "y", {})], w=array(5, WIDTH, 3))
    kept = observe(model, ["wide", "rows"], batches, lambda done, total: None, means=["wide"], moments=["wide"])
    wide = [np.moveaxis(run_of(model, batch, "wide"), 1, -1).reshape(-1, 5) for batch in batches]
    stacked = np.concatenate(wide)
    np.testing.assert_allclose(kept["wide"].minimum, stacked.min(0), rtol=1e-6)
    np.testing.assert_allclose(kept["wide"].maximum, stacked.max(0), rtol=1e-6)
    np.testing.assert_allclose(kept["wide"].moment, stacked.T @ stacked / len(stacked), rtol=1e-4, atol=1e-5)
    assert kept["rows"].minimum.shape == (WIDTH,)
    assert channel_axis.rows(np.ones((2, 3, 4), np.float32), None).shape == (24, 1)


def run_of(model: onnx.ModelProto, batch: Batch, name: str) -> np.ndarray:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.insert(0, onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return run(copy, input_ids=batch.feeds.input_ids)


def test_max_pooling_over_axis_2_is_masked_along_axis_2() -> None:
    model = text(
        [
            ("Unsqueeze", ["attention_mask", "one"], "mask", {}),
            ("Equal", ["mask", "zero"], "padding", {}),
            ("Where", ["padding", "fill", "x"], "filled", {}),
            ("ReduceMax", ["filled", "two"], "y", {"keepdims": 0}),
        ],
        one=numbers(1), two=numbers(2), zero=np.array(0, np.int64), fill=np.array(-1e4, np.float32),
    )  # fmt: skip
    edited = ir.from_proto(model)
    assert where_to_min(edited).count == 1
    check(model, ir.to_proto(edited))
