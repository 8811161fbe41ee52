"""The choice of one token moves up: the FP32 function stays, the last layer computes one row, and finer codes pay."""

from __future__ import annotations

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Statistics
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, dims
from edgeq.graph.float_session import FloatSession
from edgeq.graph.roles import Role
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.output_precision import output_params, rounding_loss
from edgeq.quantization.rewrites import integer
from edgeq.quantization.rewrites.decompose import DECOMPOSE
from edgeq.quantization.rewrites.single_token_last_layer import single_token_last_layer
from edgeq.quantization.schemes import SCHEMES

TOKENS = Tokens(encoder.tokens(3, 40), 0, 0)
LAST_PRODUCTS = ("layer.1.query", "layer.1.out", "layer.1.ffn", "layer.1.ffn_out")


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def embed(model: onnx.ModelProto) -> Embeddings:
    return embed_batches(FloatSession.of(model, optimize=False), batches(TOKENS), len(TOKENS.ids))


def apart(model: onnx.ModelProto) -> ir.Model:
    graph_model = ir.from_proto(model)
    for rewrite in DECOMPOSE:
        rewrite(graph_model)
    return clean(graph_model)


def clean(model: ir.Model) -> ir.Model:
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    return model


def rows_of(model: ir.Model) -> dict[str, bool]:
    """Say of each weight product whether it computes one token."""
    found = {str(node.name): node for node in model.graph if node.op_type == "MatMul" and str(node.name)[:5] == "layer"}
    for node in found.values():
        shape = dims(node.outputs[0])
        assert shape is not None and (roles.has(node, Role.SINGLE_TOKEN)) == (shape[-2] == 1)
    return {name: roles.has(node, Role.SINGLE_TOKEN) for name, node in found.items()}


@pytest.mark.parametrize(
    ("pooling", "attention", "crosses"),
    [
        ("slice", "all", True),
        ("lookup", "all", True),
        ("last", "all", True),
        ("last", "causal", True),
        ("slice", "causal", True),
        ("slice", "local", True),
        ("last", "local", False),  # what the last token sees is no row of padding alone
    ],
)
def test_the_function_stays_and_the_last_layer_computes_one_token(pooling: str, attention: str, crosses: bool) -> None:
    before = encoder.encoder(pooling=pooling, attention=attention)
    model = apart(before)
    assert single_token_last_layer(model, {}).count > 15
    one = {name for name, is_one in rows_of(clean(model)).items() if is_one}
    products = set(LAST_PRODUCTS if crosses else LAST_PRODUCTS[1:])
    assert products <= one and not any(name.startswith(("layer.0", "layer.1.key", "layer.1.value")) for name in one)
    assert ("layer.1.query" in one) == crosses
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    np.testing.assert_allclose(embed(after), embed(before), rtol=0, atol=1e-5)


def test_what_is_taken_of_a_tensor_has_its_statistics() -> None:
    model = apart(encoder.encoder(pooling="slice"))
    known = Statistics(np.array([-1.0], np.float32), np.array([1.0], np.float32))
    observed = {"layer.0.norm2": known}
    single_token_last_layer(model, observed)
    assert observed == {"layer.0.norm2": known, "layer.0.norm2/one": known}


def test_a_mean_and_hidden_states_with_other_readers_are_left_alone() -> None:
    model = apart(encoder.encoder())
    kept = ir.to_proto(model).SerializeToString(deterministic=True)
    assert single_token_last_layer(model, {}).count == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == kept
    model = apart(encoder.encoder(pooling="slice"))
    hidden = next(node for node in model.graph if node.name == "pooled3").inputs[0]
    assert hidden is not None
    model.graph.append(ir.node("Relu", [hidden], name="other"))
    assert single_token_last_layer(model, {}).count == 0
    assert any(node.name == "pooled3" for node in model.graph)


def test_a_row_that_is_not_the_first_is_no_choice() -> None:
    model = apart(encoder.encoder(pooling="lookup"))
    lookup = next(node for node in model.graph if node.name == "pooled")
    lookup.replace_input_with(1, add_constant(model.graph, "second", np.array(1, np.int64)))
    assert single_token_last_layer(model, {}).count == 0


@pytest.fixture(scope="module", params=["slice", "last"])
def calibrated(request: pytest.FixtureRequest) -> calibrate.Observed:
    float_model = encoder.encoder(pooling=request.param)
    return calibrate.calibrate(float_model, Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


def bits_read(model: onnx.ModelProto) -> dict[str, int]:
    """Give the bits of what each product of the last layer reads."""
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith("layer.1")]
    return {node.name: stored[makers[node.input[0]].input[2]].dtype.itemsize * 8 for node in products}


@pytest.mark.parametrize(("scheme", "bits"), [("w8a8-int", 16), ("w8a8-int-npu", 8)])
def test_one_row_has_finer_codes_where_its_kernels_exist(
    calibrated: calibrate.Observed, scheme: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES[scheme])[0]
    found = bits_read(one)
    assert {found[name] for name in (*LAST_PRODUCTS, "layer.1.context")} == {bits}
    assert found["layer.1.key"] == found["layer.1.value"] == 8
    monkeypatch.setattr(integer, "single_token_last_layer", lambda model, statistics: Rewrites(0))
    every = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES[scheme])[0]
    reference = embed(calibrated.model)
    finer, coarse = (1.0 - cosines(reference, embed(model)) for model in (one, every))
    if bits == 8:  # the same codes, of fewer tokens
        np.testing.assert_allclose(finer, coarse, rtol=0, atol=1e-3)
    assert finer.mean() < coarse.mean() * 1.01 and finer.mean() < 0.01


def test_products_that_take_one_token_share_its_shares() -> None:
    """An NPU may leave the lookup of the shares to its host: one is enough."""
    float_model = encoder.encoder(pooling="last")
    found = calibrate.calibrate(float_model, Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)
    model = quantize.quantize(found.model, found.statistics, SCHEMES["w8a8-int-npu"])[0]
    named = [node.name for node in model.graph.node]
    assert sum(name.endswith("/one/share") for name in named) == 1
    assert sum(name.endswith("/one/each") for name in named) == 2  # of the residual stream, and of the queries


def cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    return np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def seen(columns: np.ndarray) -> Statistics:
    return Statistics(columns.min(axis=0).astype(np.float32), columns.max(axis=0).astype(np.float32))


def test_vectors_with_one_large_channel_have_16_bits_and_others_what_is_wanted() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((400, 64))
    even = seen(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert output_params(even, 8)[1] == 8
    vectors[:, 5] += 30.0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    codes, bits = output_params(seen(vectors), 8)
    assert bits == 16 and codes.high == 32767 and codes.scale * 32767 == pytest.approx(1.1 * vectors.max(), rel=1e-4)
    step = codes.scale * 32767 / 127
    rounded = np.rint(vectors / step) * step
    first, second = (array - array.mean(axis=0) for array in (vectors, rounded))
    assert rounding_loss(seen(vectors), step) == pytest.approx(1 - cosines(first, second).mean(), rel=0.3)


def test_vectors_that_never_differ_have_the_bits_that_are_wanted() -> None:
    assert output_params(seen(np.ones((3, 8))), 8)[1] == 8
