"""What a vendor's compiler is given: the function of the equalised model, in an opset and operators that it reads."""

from __future__ import annotations

from collections import Counter

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_integer
from onnx import helper

from edgeq.calibration.statistics import Statistics
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import Unsupported
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import stage_functions
from edgeq.quantization import quantize, sensitivity, vendor_codes
from edgeq.quantization.rewrites.cast_before_unsqueeze import cast_before_unsqueeze
from edgeq.quantization.schemes import SCHEMES, promote, widened
from edgeq.quantization.vendor import rewrite_for_vendor
from edgeq.records import QdqModel, Scheme, VendorSpec

TOKENS = Tokens(encoder.tokens(3, 12), 0, 0)
INT8 = VendorSpec(opset=19, dtype="int8", output_ratio_max=10.0)

SEEN = tiny_integer.calibrated().statistics


def embed(model: onnx.ModelProto) -> np.ndarray:
    return embed_batches(FloatSession.of(model), batches(TOKENS), len(TOKENS.ids))


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def scaled_norms(model: onnx.ModelProto) -> list[str]:
    made = {output: node for node in model.graph.node for output in node.output}
    norms = [node for node in model.graph.node if node.op_type == "Mul"]
    return [node.name for node in norms if any(made.get(n, node).op_type == "LayerNormalization" for n in node.input)]


def test_the_function_stays_and_every_operator_can_be_read() -> None:
    equalized = tiny_integer.calibrated().model
    made, integer, floats = rewrite_for_vendor(equalized, SEEN, INT8)
    assert made.opset_import[0].version == 19 and made.ir_version == 9
    assert [output.name for output in made.graph.output] == ["sentence_embedding"]
    assert kinds(made)["Erf"] == kinds(equalized)["Gelu"] and "Gelu" not in kinds(made)
    assert len(integer) == 12 and all("/side" in name for name in floats)
    assert np.abs(embed(made) - embed(equalized)).max() < 1e-6


def test_scaled_tensors_come_from_a_norm_of_their_own() -> None:
    equalized = tiny_integer.calibrated().model
    before = scaled_norms(equalized)
    made = rewrite_for_vendor(equalized, SEEN, INT8)[0]
    assert before and not scaled_norms(made)
    assert kinds(made)["LayerNormalization"] == kinds(equalized)["LayerNormalization"] + len(before)
    norms = [node for node in made.graph.node if node.op_type == "LayerNormalization"]
    assert all({"axis", "epsilon"} <= {attribute.name for attribute in node.attribute} for node in norms)
    whole = rewrite_for_vendor(equalized, SEEN, INT8.model_copy(update={"dtype": "float16"}))
    assert scaled_norms(whole[0]) == before and whole[1] == ()


def test_a_factor_of_another_shape_is_no_gain() -> None:
    near = onnx.ModelProto()
    near.CopyFrom(tiny_integer.calibrated().model)
    name = scaled_norms(near)[0]
    (node,) = (item for item in near.graph.node if item.name == name)
    factor = next(tensor for tensor in near.graph.initializer if tensor.name in node.input)
    factor.CopyFrom(onnx.numpy_helper.from_array(np.float32([2.0]), factor.name))
    assert scaled_norms(rewrite_for_vendor(near, SEEN, INT8)[0]) == [name]


def test_an_approximated_gelu_is_refused() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(tiny_integer.calibrated().model)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.attribute.append(helper.make_attribute("approximate", "tanh"))
    with pytest.raises(Unsupported, match="Gelu by tanh has no form before opset 20"):
        rewrite_for_vendor(model, SEEN, INT8)


def test_a_product_with_one_huge_channel_stays_float() -> None:
    seen = SEEN["layer.1.ffn_out.out"]
    huge = np.where(np.arange(encoder.DIM) == 5, np.float32(50.0) * np.abs(seen.maximum).max(), seen.maximum)
    wide = {**SEEN, "layer.1.ffn_out.out": Statistics(seen.minimum, huge)}
    model = tiny_integer.calibrated().model
    before, after = (rewrite_for_vendor(model, seen, INT8).integer_products for seen in (SEEN, wide))
    assert set(before) - set(after) == {"layer.1.ffn_out"}
    lenient = INT8.model_copy(update={"output_ratio_max": 1e6})
    assert "layer.1.ffn_out" in rewrite_for_vendor(model, wide, lenient)[1]


def test_promoted_products_stay_float() -> None:
    scheme = promote(SCHEMES["rockchip-int8"], ["layer.1.ffn_out"])
    observed = tiny_integer.calibrated()
    _, integer, floats = quantize.quantize(observed.model, observed.statistics, scheme)
    assert "layer.1.ffn_out" in floats and len(integer) == 11


def test_a_vendors_codes_rank_its_products_and_tables() -> None:
    scheme, observed = SCHEMES["rockchip-int8"], tiny_integer.calibrated()
    products = quantize.quantize(observed.model, SEEN, scheme).integer_products
    coded = vendor_codes.coded(observed.model, SEEN, products)
    found = kinds(coded)
    assert found["QuantizeLinear"] == 8 + len(products) + kinds(observed.model)["Gather"]  # read, given, looked up
    assert np.abs(embed(coded) - embed(observed.model)).max() > 1e-3
    ranked = sensitivity.measure(observed.model, coded, scheme, products, TOKENS, lambda *_: None)
    assert sorted(name for site in ranked.sites for name in site.names) == sorted(products)
    assert ranked.loss > ranked.rest > 0.0

    hundred = dict(SEEN)  # a hundredfold range: its codes lose most
    hundred["layer.1.ffn_out.out"] = Statistics(
        SEEN["layer.1.ffn_out.out"].minimum * 100, SEEN["layer.1.ffn_out.out"].maximum * 100
    )
    wide = vendor_codes.coded(observed.model, hundred, products)
    ranked = sensitivity.measure(observed.model, wide, scheme, products, TOKENS, lambda *_: None)
    assert ranked.sites[0].names == ("layer.1.ffn_out",)


def test_the_last_resort_is_16_bit_floating_point_in_all() -> None:
    form = widened(SCHEMES["rockchip-int8"])
    assert form is not None and form.name == "rockchip-int8+16bit" and form.feeds == 0
    observed = tiny_integer.calibrated()
    made, asked = (quantize.quantize(observed.model, SEEN, each) for each in (form, SCHEMES["rockchip-float16"]))
    assert made.model.SerializeToString(deterministic=True) == asked.model.SerializeToString(deterministic=True)
    assert made.integer_products == ()


def test_feeds_are_spread_over_the_lengths() -> None:
    tokens = [[1] * length for length in (3, 9, 5, 7, 1)]
    assert [len(ids) for ids in stage_functions.spaced_by_length(tokens, 3)] == [9, 5, 1]
    assert [len(ids) for ids in stage_functions.spaced_by_length(tokens, 99)] == [9, 7, 5, 3, 1]


def test_a_scheme_of_a_vendor_is_read_back_as_it_was() -> None:
    given = SCHEMES["rockchip-int8"]
    assert Scheme.model_validate_json(given.model_dump_json()) == given
    assert QdqModel.model_fields["feeds"].default is None


@pytest.mark.parametrize("first", ["cast", "unsqueeze"])
def test_the_mask_is_converted_once(first: str) -> None:
    """Whichever of the two readers stands first in the graph."""
    attention = [
        helper.make_node("Cast", ["attention_mask"], ["mask"], "mask", to=onnx.TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axes"], ["bias"], "bias"),
    ]
    pooling = [
        helper.make_node("Unsqueeze", ["attention_mask", "axes"], ["wide"], "wide"),
        helper.make_node("Cast", ["wide"], ["weights"], "weights", to=onnx.TensorProto.FLOAT),
    ]
    nodes = [*attention, *pooling] if first == "cast" else [*pooling, *attention]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Sub", ["weights", "bias"], ["both"], "both")],
        "masks",
        [helper.make_tensor_value_info("attention_mask", onnx.TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("both", onnx.TensorProto.FLOAT, ["batch", "sequence", 1])],
        [helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [2])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert cast_before_unsqueeze(model).count == 1
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    (cast,) = (node for node in made.graph.node if node.op_type == "Cast")
    assert cast.input[0] == "attention_mask"
