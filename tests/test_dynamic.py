"""`w8a8-dynamic`: each token has a scale of its own, so no range can be exceeded and no other text counts."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeq.backends import onnxruntime as backend
from edgeq.backends.onnxruntime.joined_heads import JOINT
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize, schemes
from edgeq.quantization.schemes import SCHEMES

LAYERS, PRODUCTS = 2, 12
SCHEME = SCHEMES["w8a8-dynamic"]
TOKENS = Tokens(encoder.tokens(5, 32), 0, 0)


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def seen() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(dense=True), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


@pytest.fixture(scope="module")
def lowered(seen: calibrate.Observed, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return lowered_by(seen, "w8a8-dynamic", tmp_path_factory.mktemp("dynamic"))


def lowered_by(seen: calibrate.Observed, scheme: str, folder: Path) -> onnx.ModelProto:
    path = folder / f"{scheme}.onnx"
    onnx.save(quantize.quantize(seen.model, seen.statistics, SCHEMES[scheme])[0], path)
    return backend.flattened(path)


def embed(model: onnx.ModelProto, tokens: Tokens = TOKENS) -> Embeddings:
    return embed_batches(FloatSession.of(model), batches(tokens), len(tokens))


def cosines(one: Embeddings, other: Embeddings) -> Embeddings:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.sum(one * other, axis=1) / lengths


def test_all_products_are_integer_and_nearer_than_with_static_ranges(
    seen: calibrate.Observed, lowered: onnx.ModelProto, tmp_path: Path
) -> None:
    reference = embed(seen.model)
    static = lowered_by(seen, "w8a8-gemm", tmp_path)
    losses = [1.0 - cosines(reference, embed(model)).mean() for model in (lowered, static)]
    assert losses[0] < losses[1] and losses[0] < 1e-3
    _, products, floats = quantize.quantize(seen.model, seen.statistics, SCHEME)
    assert len(products) == PRODUCTS and floats


def test_lowering_changes_no_vector_and_joins_heads(
    seen: calibrate.Observed, lowered: onnx.ModelProto, tmp_path: Path
) -> None:
    model, products, _ = quantize.quantize(seen.model, seen.statistics, SCHEME)
    assert np.abs(embed(model) - embed(lowered)).max() < 2e-3  # a Div that rounds otherwise moves a few codes by one
    assert cosines(embed(model), embed(lowered)).min() > 0.99999
    joint = [node.name for node in lowered.graph.node if JOINT in node.name and node.op_type == "MatMul"]
    assert len(joint) == LAYERS and all(set(name.split(JOINT)) <= set(products) for name in joint)
    by_axis = [node for node in lowered.graph.node if node.op_type == "QuantizeLinear"]
    assert all(node.attribute[0].i == 0 for node in by_axis)  # a scale for each token
    assert not [node for node in lowered.graph.node if node.op_type == "Div" and "/scaled" in node.name]


def test_a_text_has_one_vector_whatever_stands_beside_it(lowered: onnx.ModelProto) -> None:
    session = FloatSession.of(lowered)
    short, long = sorted(encoder.tokens(7, 40), key=len)[10:31:20]
    first, second = np.array([short]), np.array([long])
    length = len(long)
    ids, mask = np.zeros((2, length), np.int64), np.zeros((2, length), np.int64)
    for row, text in enumerate((first, second)):
        ids[row, : text.shape[1]], mask[row, : text.shape[1]] = text, 1
    alone = session(Feeds(first, np.ones_like(first)))
    beside = session(Feeds(ids, mask))
    assert cosines(alone, beside[:1])[0] > 1.0 - 1e-6


def test_values_that_calibration_never_saw_cost_little(seen: calibrate.Observed, tmp_path: Path) -> None:
    """Scale what the layers' products read: a static range saturates, a token's own does not."""
    lost = {}
    for name in ("w8a8-gemm", "w8a8-dynamic"):
        model = lowered_by(seen, name, tmp_path)
        own = quantize.QUANTIZERS[SCHEMES[name].kind].rewrite(seen.model, seen.statistics, SCHEMES[name])
        lost[name] = [
            1.0 - cosines(embed(stretched(own, factor)), embed(stretched(model, factor))).mean()
            for factor in (1.0, 4.0)
        ]
    assert lost["w8a8-gemm"][1] > 5.0 * lost["w8a8-gemm"][0]
    assert lost["w8a8-dynamic"][1] < 0.05 * lost["w8a8-gemm"][1]  # not nothing: larger scores amplify every error


def stretched(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Multiply the gains and biases of the LayerNormalizations inside the layers."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    names = {name for node in changed.graph.node if node.op_type == "LayerNormalization" for name in node.input[1:]}
    for tensor in changed.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    return changed


def test_a_token_of_zeros_gives_zeros(seen: calibrate.Observed) -> None:
    model, products, _ = quantize.quantize(seen.model, seen.statistics, SCHEME)
    scaled = [node for node in model.graph.node if node.op_type == "Div" and node.output[0].endswith("/scaled")]
    assert len(scaled) == 4 * LAYERS
    largest = {node.output[0]: node for node in model.graph.node if node.op_type == "Max"}
    assert all("least" in largest[node.input[1]].input for node in scaled)
    least = next(item for item in model.graph.initializer if item.name == "least")
    assert 0.0 < float(numpy_helper.to_array(least)) < 1e-20


def test_float_products_stay_float(seen: calibrate.Observed, tmp_path: Path) -> None:
    _, products, floats = quantize.quantize(seen.model, seen.statistics, SCHEME)
    scheme = schemes.promote(SCHEME, (), products, has_float_tables=True)
    made, integer, kept = quantize.quantize(seen.model, seen.statistics, scheme)
    assert integer == () and set(kept) == {*floats, *products}
    onnx.save(made, tmp_path / "float.onnx")
    assert cosines(embed(seen.model), embed(backend.flattened(tmp_path / "float.onnx"))).min() > 1.0 - 1e-6
