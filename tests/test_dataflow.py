"""What follows from sizes alone, what follows from the attention mask, and what from neither."""

from __future__ import annotations

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.graph.dataflow import follows_from_sizes, mask_values, shape_values

TABLE = np.ones((8, 4), np.float32)
CONSTANTS = {
    "table": TABLE, "codes": np.ones((8, 4), np.int8), "zero": np.array([0], np.int64), "one": np.array([1], np.int64),
    "half": np.array(0.5, np.float32), "start": np.array(0, np.int64), "step": np.array(1, np.int64),
    "scale": np.array(0.5, np.float32), "point": np.array(0, np.int8),
}  # fmt: skip


def graph(*nodes: onnx.NodeProto) -> ir.Graph:
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()]
    end = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return ir.from_proto(helper.make_model(helper.make_graph(list(nodes), "g", inputs, [end], stored))).graph


def names(values: set[ir.Value]) -> set[str]:
    return {str(value.name) for value in values}


def node(op_type: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=output, **attributes)


SIZES = (
    node("Shape", "input_ids", "length", start=1, end=2),
    node("Squeeze", "length", "count"),
    node("Range", "start count step", "positions"),
    node("Gather", "table positions", "by_position"),
    node("Slice", "table zero length zero", "rows"),
    node("Add", "one one", "two"),  # of constants alone
    node("Mul", "positions two", "doubled"),
)
MASK = (
    node("Cast", "attention_mask", "float_mask", to=TensorProto.FLOAT),
    node("Sub", "float_mask half", "shifted"),
    node("Mul", "shifted positions", "of_both"),
    node("Gather", "table attention_mask", "by_mask"),
)
TOKENS = (node("Gather", "table input_ids", "words"), node("Mul", "words shifted", "masked_words"))


def test_sizes_lead_to_positions_and_their_rows() -> None:
    found = shape_values(graph(*SIZES, *MASK, *TOKENS))
    assert names(found) == {"length", "count", "positions", "by_position", "rows", "doubled"}


def test_the_mask_may_meet_sizes_but_no_tokens() -> None:
    whole = graph(*SIZES, *MASK, *TOKENS)
    assert names(mask_values(whole)) == {"attention_mask", "float_mask", "shifted", "of_both", "by_mask"}
    assert not mask_values(whole) & shape_values(whole)


def test_a_quantiser_keeps_the_rows_that_it_stores_in_integers_for_itself() -> None:
    whole = graph(*SIZES, *MASK, *TOKENS)
    assert names(shape_values(whole) - shape_values(whole, with_rows=False)) == {"rows"}
    assert names(mask_values(whole) - mask_values(whole, with_rows=False)) == {"by_mask"}


def test_both_end_where_integers_begin() -> None:
    whole = graph(
        *SIZES, *MASK,
        node("QuantizeLinear", "by_position scale point", "quantised_positions"),
        node("QuantizeLinear", "shifted scale point", "quantised_mask"),
        node("Slice", "codes zero length zero", "quantised_rows"),
        node("Gather", "codes attention_mask", "quantised_by_mask"),
    )  # fmt: skip
    assert not any(name.startswith("quantised") for name in names(shape_values(whole) | mask_values(whole)))


def test_constants_follow_from_nothing() -> None:
    whole = graph(*SIZES)
    assert "two" not in names(shape_values(whole) | mask_values(whole))


@pytest.mark.parametrize("whole", [graph(*SIZES, *MASK, *TOKENS), ir.from_proto(encoder.encoder()).graph])
def test_walking_up_from_one_value_gives_the_same(whole: ir.Graph) -> None:
    found = shape_values(whole)
    assert found
    for value in (value for node in whole for value in node.outputs):
        assert follows_from_sizes(value) is (value in found), value.name
