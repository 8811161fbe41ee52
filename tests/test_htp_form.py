"""The HTP form: FP32 unchanged by what is folded, unsigned codes on every tensor, 16 bits where the rule says so."""

from __future__ import annotations

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import checked, constant, made_by, readers
from edgeq.graph.float_session import FloatSession
from edgeq.graph.roles import Role
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.rewrites.htp import htp_form
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import HtpSpec

TOKENS = Tokens(encoder.tokens(3, 40), 0, 0)
HTP = ("w8a8-htp", "w8a16-htp")
LAYERS, SIDES = 2, 1
FINE = 2 * SIDES  # the branch dominates its block: what rounding takes from its weights is a product of its own
PRODUCTS = 6 * LAYERS + 2 * SIDES + FINE
FLOORS = {"w8a8-htp": 0.97, "w8a16-htp": 0.985}


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def embed(model: onnx.ModelProto) -> Embeddings:
    return embed_batches(FloatSession.of(model, optimize=False), batches(TOKENS), len(TOKENS.ids))


def centred_cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    """Compare after subtracting the mean: random encoders hardly separate texts."""
    a, b = (x.astype(np.float64) - first.mean(0) for x in (first, second))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def calibrated() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


@pytest.fixture(scope="module")
def models(calibrated: calibrate.Observed) -> dict[str, onnx.ModelProto]:
    return {name: quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES[name])[0] for name in HTP}


def bits_of(value: ir.Value | None) -> int:
    """Give the bits of the codes that a value is, or is dequantised from."""
    dequantize = made_by(value, "DequantizeLinear", "QuantizeLinear")
    assert dequantize is not None, f"{value} is float"
    zero_point = constant(dequantize.inputs[2])
    assert zero_point is not None
    return zero_point.dtype.itemsize * 8


@pytest.mark.parametrize("name", HTP)
def test_the_form_keeps_the_function(calibrated: calibrate.Observed, name: str) -> None:
    form = SCHEMES[name].spec
    assert isinstance(form, HtpSpec)
    model, _, _ = htp_form(calibrated.model, calibrated.statistics, form)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Gemm") == PRODUCTS and kinds.count("LpNormalization") == 1 and "ReduceL2" not in kinds
    assert np.abs(embed(calibrated.model) - embed(checked(model))).max() < 1e-5


@pytest.mark.parametrize("name", HTP)
def test_no_operator_reads_float_and_every_code_is_unsigned(models: dict[str, onnx.ModelProto], name: str) -> None:
    graph = ir.from_proto(models[name]).graph
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            is_weight = str(node.name).endswith(("/weight", "/bias"))
            assert is_weight or (zero_point is not None and zero_point.dtype in (np.uint8, np.uint16)), node.name
            continue
        for value in node.inputs:
            is_float = value is not None and value.dtype == ir.DataType.FLOAT
            assert not is_float or made_by(value, "DequantizeLinear") is not None, (node.name, value)


def test_sixteen_bits_are_where_the_rule_says(models: dict[str, onnx.ModelProto]) -> None:
    counted = {"Gemm": 0, "Add": 0, "LayerNormalization": 0, "8-bit MatMul": 0, "16-bit MatMul": 0}
    for node in ir.from_proto(models["w8a8-htp"]).graph:
        if node.op_type == "Gemm":
            assert bits_of(node.inputs[0]) == (16 if roles.has(node, Role.OUTLIER_BRANCH) else 8), node.name
            counted["Gemm"] += 1
        elif node.op_type == "LayerNormalization":
            assert [bits_of(value) for value in node.inputs[:2]] == [16, 8], node.name
            counted["LayerNormalization"] += 1
        elif node.op_type == "Add" and "masked" not in str(node.name):
            assert [bits_of(value) for value in node.inputs] == [16, 16], node.name
            counted["Add"] += 1
        elif node.op_type == "MatMul" and "pooled" not in str(node.name):
            assert [bits_of(value) for value in node.inputs] == [8, 8], node.name
            (quantize_output,) = readers(node.outputs[0])
            counted[f"{bits_of(quantize_output.outputs[0])}-bit MatMul"] += 1
    assert counted == {
        "Gemm": PRODUCTS, "Add": 1 + 2 * LAYERS + SIDES + FINE, "LayerNormalization": 1 + 2 * LAYERS,
        "8-bit MatMul": LAYERS, "16-bit MatMul": LAYERS,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_vectors_are_near_fp32(
    models: dict[str, onnx.ModelProto], calibrated: calibrate.Observed, name: str, floor: float
) -> None:
    assert centred_cosines(embed(calibrated.model), embed(models[name])).mean() > floor


@pytest.mark.parametrize("tensor", ["layer.1.gelu/scale", "layer.0.norm/gain/scale", "layer.1.ffn/weight/scale"])
def test_a_wrong_scale_shows(models: dict[str, onnx.ModelProto], calibrated: calibrate.Observed, tensor: str) -> None:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(models["w8a16-htp"])
    (scale,) = (item for item in wrong.graph.initializer if item.name == tensor)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(4), scale.name))
    assert centred_cosines(embed(calibrated.model), embed(wrong)).mean() < FLOORS["w8a16-htp"]


def test_multipliers_of_16_bit_products_are_as_short_as_the_oldest_unit_keeps_them(
    models: dict[str, onnx.ModelProto],
) -> None:
    def scale_of(value: ir.Value | None) -> np.ndarray:
        node = made_by(value, "DequantizeLinear", "QuantizeLinear")
        assert node is not None
        stored = constant(node.inputs[1])
        assert stored is not None
        return stored.astype(np.float64)

    products = [node for node in ir.from_proto(models["w8a16-htp"]).graph if node.op_type == "Gemm"]
    assert len(products) == PRODUCTS
    for node in products:
        (reader,) = readers(node.outputs[0])
        source, weight, bias = map(scale_of, node.inputs)
        fraction = np.frexp(source * weight / scale_of(reader.outputs[0]))[0] * 2.0**11
        assert np.abs(fraction - np.rint(fraction)).max() < 1e-3, node.name
        np.testing.assert_allclose(bias, source * weight, rtol=1e-6)


def test_a_masked_token_leaves_nothing(models: dict[str, onnx.ModelProto]) -> None:
    session = FloatSession.of(models["w8a16-htp"], optimize=False)
    short = Tokens(TOKENS.ids[:4], 0, 0)
    alone = embed_batches(session, batches(short, batch_size=1), 4)
    (padded,) = batches(Tokens((*short.ids, (7,) * encoder.LONGEST), 0, 5), batch_size=5)
    together = embed_batches(session, [padded], 5)[:4]
    assert (alone * together).sum(1).min() > 0.9999


def test_a_dense_layer_is_a_wide_product() -> None:
    seen = calibrate.calibrate(encoder.encoder(dense=True), Tokens(encoder.tokens(1, 32), 0, 0), 0, silent)
    model, products, floats = quantize.quantize(seen.model, seen.statistics, SCHEMES["w8a8-htp"])
    (dense,) = (node for node in ir.from_proto(model).graph if node.name == "dense")
    assert dense.op_type == "Gemm" and bits_of(dense.inputs[0]) == 16
    assert "dense" in products and floats == ()


def test_quantising_twice_gives_the_same_bytes(
    models: dict[str, onnx.ModelProto], calibrated: calibrate.Observed
) -> None:
    again = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES["w8a8-htp"])[0]
    assert again.SerializeToString(deterministic=True) == models["w8a8-htp"].SerializeToString(deterministic=True)


def test_an_operator_without_form_is_named(calibrated: calibrate.Observed) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    next(node for node in model.graph.node if node.op_type == "Gelu" and not node.metadata_props).op_type = "Erf"
    with pytest.raises(Unsupported, match=r"layer\.0\.gelu \(Erf, near layer\.0\.\w+\): Erf has no form for HTP"):
        quantize.quantize(model, calibrated.statistics, SCHEMES["w8a16-htp"])


def filled(given: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.NodeProto]:
    """Fill padding with a Where in front of the pooling, as max pooling does; give the pooling's node, too."""
    model = onnx.ModelProto()
    model.CopyFrom(given)
    (pooled,) = (node for node in model.graph.node if node.name == "pooled3")
    numbers = {"last": np.array([-1], np.int64), "zero": np.array(0, np.float32), "fill": np.array(-1e4, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in numbers.items())
    for kind, inputs, name in (
        ("Unsqueeze", ["mask", "last"], "column"),
        ("Equal", ["column", "zero"], "is_padding"),
        ("Where", ["is_padding", "fill", pooled.input[1]], "filled"),
    ):
        node = helper.make_node(kind, inputs, [name], name=name)
        model.graph.node.insert(list(model.graph.node).index(pooled), node)
    pooled.input[1] = "filled"
    return model, pooled


def test_max_pooling_is_taken_and_padding_leaves_nothing(calibrated: calibrate.Observed) -> None:
    model, pooled = filled(encoder.encoder())
    pooled.op_type = "ReduceMax"
    pooled.input[:] = ["filled", "axis1"]
    del pooled.metadata_props[:]
    seen = calibrate.calibrate(model, Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)
    proto = quantize.quantize(seen.model, seen.statistics, SCHEMES["w8a16-htp"])[0]
    assert centred_cosines(embed(seen.model), embed(proto)).mean() > FLOORS["w8a16-htp"]
    session = FloatSession.of(proto, optimize=False)
    short = Tokens(TOKENS.ids[:4], 0, 0)
    alone = embed_batches(session, batches(short, batch_size=1), 4)
    (padded,) = batches(Tokens((*short.ids, (7,) * encoder.LONGEST), 0, 5), batch_size=5)
    assert (alone * embed_batches(session, [padded], 5)[:4]).sum(1).min() > 0.9999


def test_a_where_that_is_no_max_pooling_is_refused_with_the_reason(calibrated: calibrate.Observed) -> None:
    with pytest.raises(Unsupported, match=r"filled \(Where\): Where has no form for HTP but in max pooling"):
        quantize.quantize(filled(calibrated.model)[0], calibrated.statistics, SCHEMES["w8a16-htp"])


@pytest.mark.parametrize("attention", ["causal", "local"])
def test_a_causal_and_a_local_mask_shut_out_what_the_float_model_shuts_out(attention: str) -> None:
    seen = calibrate.calibrate(encoder.encoder(attention=attention), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)
    proto = quantize.quantize(seen.model, seen.statistics, SCHEMES["w8a16-htp"])[0]
    assert centred_cosines(embed(seen.model), embed(proto)).mean() > FLOORS["w8a16-htp"]
    (limited,) = (node for node in ir.from_proto(proto).graph if node.op_type == "Min")
    assert [bits_of(value) for value in limited.inputs] == [16, 16]


def test_a_mask_of_something_else_is_refused(calibrated: calibrate.Observed) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    (shifted,) = (node for node in model.graph.node if node.name == "mask_shifted")
    shifted.input[0] = "mask_twice"  # a token sees what it and the other may be seen by: positions say nothing of it
    nodes = [("Unsqueeze", ["mask", "axes13"], "mask_rows"), ("Mul", ["mask4", "mask_rows"], "mask_twice")]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3], np.int64), "axes13"))
    for kind, inputs, name in nodes:
        place = list(model.graph.node).index(shifted)
        model.graph.node.insert(place, helper.make_node(kind, inputs, [name], name=name))
    with pytest.raises(Unsupported, match="attention is masked by more than padding and positions"):
        quantize.quantize(model, calibrated.statistics, SCHEMES["w8a16-htp"])


def test_missing_statistics_are_named(calibrated: calibrate.Observed) -> None:
    fewer = {name: item for name, item in calibrated.statistics.items() if name != "layer.1.sum"}
    with pytest.raises(EdgeqError, match=r"layer\.1\.sum"):
        quantize.quantize(calibrated.model, fewer, SCHEMES["w8a16-htp"])
