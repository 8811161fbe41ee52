"""`w4a8-dynamic`: 4-bit weights with a scale for each block of input channels, 4-bit tables, integer products."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgeq import targets
from edgeq.backends import onnxruntime as backend
from edgeq.calibration.statistics import Statistics
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.graph.edit import add_constant, replace_uses
from edgeq.graph.float_session import FloatSession
from edgeq.graph.linear import Linear
from edgeq.pipeline import calibrate
from edgeq.quantization import block_weights, quantize, schemes, weight_rounding
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import QdqModel
from edgeq.system.files import file_ref

SCHEME, PRODUCTS = SCHEMES["w4a8-dynamic"], 12
TARGET = targets.load_target("x86-64-onnxruntime-w4")
TOKENS = Tokens(encoder.tokens(5, 32), 0, 0)


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def seen() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(dense=True), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


def written(model: onnx.ModelProto, products: tuple[str, ...], floats: tuple[str, ...], folder: Path) -> QdqModel:
    path = folder / "qdq.onnx"
    onnx.save(model, path)
    return QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=SCHEME,
        inputs=("input_ids", "attention_mask"), outputs=("sentence_embedding",), dim=encoder.DIM,
        max_sequence=encoder.LONGEST, integer_matmuls=products, float_matmuls=floats,
    )  # fmt: skip


def embed(model: onnx.ModelProto) -> Embeddings:
    return embed_batches(FloatSession.of(model), batches(TOKENS), len(TOKENS))


def drawn(channels: int, outputs: int) -> tuple[NDArray[np.float32], NDArray[np.float32], Statistics]:
    """Give a weight, inputs whose channels go together, and the statistics of these."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((channels, outputs)).astype(np.float32)
    mixed = rng.standard_normal((4000, channels)) @ rng.standard_normal((channels, channels)) + 1.0
    given = mixed.astype(np.float32)
    found = Statistics(given.min(axis=0), given.max(axis=0))
    found.mean, found.moment = given.mean(axis=0), (given.T @ given / len(given)).astype(np.float32)
    return weight, given, found


@pytest.mark.parametrize("channels", [96, 80])
def test_blocks_have_scales_of_their_own_and_compensation_loses_less(channels: int) -> None:
    weight, given, found = drawn(channels, 24)
    made = weight_rounding.blocked(weight, found, 4, 32)
    nearest = weight_rounding.blocked(weight, None, 4, 32)
    assert made.codes.shape == weight.shape and made.scales.shape == made.zero_points.shape == (3, 24)
    assert made.codes.max() == 15 and made.codes.min() == 0 and made.scales.min() > 0.0
    lost = [np.square(given @ (weight - codes.real(32))).mean() for codes in (made, nearest)]
    assert lost[0] < 0.6 * lost[1]
    assert np.abs(weight - nearest.real(32)).max() < np.abs(weight).max() / 4.0


def test_ranges_of_blocks_are_those_with_the_least_error() -> None:
    weight = drawn(64, 48)[0]
    found = weight_rounding.block_parameters(weight, 4, 32)
    blocks = weight.reshape(2, 32, 48)
    whole = (blocks.max(axis=1) - blocks.min(axis=1)) / 15.0
    assert (found.scales <= whole * 1.000001).all() and (found.scales < 0.99 * whole).mean() > 0.3
    points = np.rint(-blocks.min(axis=1) / whole)[:, None]
    plain = (np.clip(np.rint(blocks / whole[:, None]) + points, 0, 15) - points) * whole[:, None]
    lost, lost_plain = (np.square(real - weight).sum() for real in (found.real(32), plain.reshape(weight.shape)))
    assert lost < 0.97 * lost_plain


def test_all_products_are_integer_in_the_runtime(seen: calibrate.Observed, tmp_path: Path) -> None:
    model, products, floats = quantize.quantize(seen.model, seen.statistics, SCHEME)
    assert len(products) == PRODUCTS
    artifact = backend.lower(written(model, products, floats, tmp_path), TARGET, tmp_path)
    assert (artifact.placement.integer_matmuls, artifact.placement.float_fallbacks) == (PRODUCTS, ())
    assert artifact.placement.operators["MatMulNBits"] == PRODUCTS
    assert artifact.placement.operators["GatherBlockQuantized"] == 1
    session = backend.load(artifact, tmp_path, TARGET)
    reference, run = embed(seen.model), embed_batches(session, batches(TOKENS), len(TOKENS))
    assert np.sum(reference * run, axis=1).mean() > 0.97  # random weights of 64 channels
    static, _, _ = quantize.quantize(seen.model, seen.statistics, SCHEMES["w8a8-gemm"])
    assert artifact.files[0].size_bytes < 0.75 * static.ByteSize()


def test_no_gemm_takes_weights_in_blocks(seen: calibrate.Observed, tmp_path: Path) -> None:
    """One that adds tokens would be computed in float; without a 4-bit table the flat list of tokens is found."""
    scheme = SCHEME.model_copy(update={"embedding_bits": 8})
    model, products, floats = quantize.quantize(seen.model, seen.statistics, scheme)
    found = written(model, products, floats, tmp_path)
    assert not [node for node in backend.flattened(Path(found.file.path)).graph.node if node.op_type == "Gemm"]
    assert backend.lower(found, TARGET, tmp_path).placement.float_fallbacks == ()


def test_the_bias_keeps_the_mean_of_a_product(seen: calibrate.Observed) -> None:
    model, products, _ = quantize.quantize(seen.model, seen.statistics, SCHEME)
    before, after = (ir.from_proto(proto).graph for proto in (seen.model, model))
    old, new = (
        Linear.of(next(node for node in graph if node.name == products[0])) for graph in (before, infused(after))
    )
    assert old is not None and new is not None
    mean = seen.statistics[str(old.product.inputs[0].name)].mean  # type: ignore[union-attr]
    assert mean is not None and np.abs(old.bias - new.bias).max() > 1e-4
    assert np.abs((mean @ old.weight + old.bias) - (mean @ new.weight + new.bias)).max() < 1e-5


def infused(graph: ir.Graph) -> ir.Graph:
    """Let products read what their DequantizeLinear gives as a constant."""
    for node in graph:
        if node.op_type == "DequantizeLinear":
            codes, scales, points = (value.const_value.numpy() for value in node.inputs)  # type: ignore[union-attr]
            wide = [np.repeat(part.astype(np.float32), 32, axis=0)[: len(codes)] for part in (scales, points)]
            real = add_constant(graph, f"{node.name}/real", (codes.astype(np.float32) - wide[1]) * wide[0])
            replace_uses(node.outputs[0], real)
    return graph


def test_a_product_without_4bit_weights_is_named(seen: calibrate.Observed, tmp_path: Path) -> None:
    model, products, floats = quantize.quantize(seen.model, seen.statistics, SCHEME)
    node, own = (next(item for item in proto.graph.node if item.name == products[0]) for proto in (model, seen.model))
    stored = next(item for item in seen.model.graph.initializer if item.name == own.input[1])
    model.graph.initializer.append(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored), "float_weight"))
    node.input[1] = "float_weight"
    placement = backend.lower(written(model, products, floats, tmp_path), TARGET, tmp_path).placement
    assert placement.float_fallbacks == (products[0],) and placement.integer_matmuls == PRODUCTS - 1


def test_a_table_is_looked_up_in_4_bits(seen: calibrate.Observed) -> None:
    model, _, _ = quantize.quantize(seen.model, seen.statistics, SCHEME)
    (node,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    assert node.domain == block_weights.RUNTIME_DOMAIN
    table = max(
        (onnx.numpy_helper.to_array(item) for item in seen.model.graph.initializer if item.dims[-1:] == [encoder.DIM]),
        key=len,
    )
    codes = weight_rounding.block_parameters(table.T, 4, 32)
    assert np.abs(codes.real(32).T - table).max() <= codes.scales.max() * 5.0  # at 70 % of a range the ends are cut off
    stored = next(onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.name == node.input[0])
    assert stored.shape == (len(table), encoder.DIM // 2)
    assert np.array_equal(stored & 15, codes.codes.T[:, 0::2]) and np.array_equal(stored >> 4, codes.codes.T[:, 1::2])


def test_float_products_stay_float_and_nothing_is_promoted(seen: calibrate.Observed) -> None:
    _, products, floats = quantize.quantize(seen.model, seen.statistics, SCHEME)
    scheme = schemes.promote(SCHEME, (), products[:2])
    _, integer, kept = quantize.quantize(seen.model, seen.statistics, scheme)
    assert set(integer) == set(products[2:]) and set(kept) == {*floats, *products[:2]}
    assert not schemes.reads_8bits(SCHEME)
