"""Encoders with channels before tokens become the graph of their twin with tokens before channels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("torch", reason="needs the extra `export`")
pytest.importorskip("transformers", reason="needs the extra `export`")

import channels_first  # noqa: E402
import tiny_source  # noqa: E402
from torch import nn  # noqa: E402

from edgeq.calibration.statistics import Statistics  # noqa: E402
from edgeq.data.sessions import Embeddings, embed_batches  # noqa: E402
from edgeq.data.tokens import Tokens, batches  # noqa: E402
from edgeq.errors import Unsupported  # noqa: E402
from edgeq.frontend import locate  # noqa: E402
from edgeq.frontend.float_model import MODEL, write_float_model  # noqa: E402
from edgeq.frontend.onnx.find import OnnxOptions  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402
from edgeq.pipeline import calibrate  # noqa: E402
from edgeq.quantization import quantize, schemes  # noqa: E402


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.body(tmp_path_factory.mktemp("channels") / "body")


def float_model(module: nn.Module, body: Path, folder: Path, pooling: str | None = None) -> onnx.ModelProto:
    """Export a module and rewrite it; `write_float_model` compares the vectors with the module's."""
    path = channels_first.written(module, folder)
    options = OnnxOptions(body / "tokenizer.json", channels_first.LONGEST)
    (folder / "out").mkdir()
    write_float_model(locate.locate(str(path), pooling, options), folder / "out", True)
    return onnx.load(folder / "out" / MODEL)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def drawn(count: int, seed: int) -> Tokens:
    rng = np.random.default_rng(seed)
    ids = (rng.integers(5, channels_first.VOCABULARY, rng.integers(3, 30)) for _ in range(count))
    return Tokens(tuple(tuple(map(int, each)) for each in ids), 0, 0)


def centred_cosine(first: Embeddings, second: Embeddings) -> float:
    a, b = (array.astype(np.float64) - array.astype(np.float64).mean(0) for array in (first, second))
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


@pytest.fixture(scope="module")
def grouped() -> channels_first.Encoder:
    return channels_first.Encoder(groups=4)


@pytest.fixture(scope="module")
def by_hand(grouped: channels_first.Encoder, body: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return float_model(grouped, body, tmp_path_factory.mktemp("by_hand"))


@pytest.fixture(scope="module")
def twin(grouped: channels_first.Encoder, body: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The same function with tokens before channels, and dense weights."""
    encoder = channels_first.Encoder()
    dense(encoder, grouped)
    return float_model(channels_first.TokensFirst(encoder), body, tmp_path_factory.mktemp("twin"))


def test_the_graph_is_that_of_tokens_before_channels(by_hand: onnx.ModelProto, twin: onnx.ModelProto) -> None:
    assert operators(by_hand) == operators(twin)
    assert operators(by_hand)["LayerNormalization"] == 5 and "Conv" not in operators(by_hand)
    assert {"layers.0.query", "layers.1.down"} <= {node.name.removeprefix("module.") for node in by_hand.graph.node}
    held = drawn(16, 3)
    one, other = (embed_batches(FloatSession.of(each), batches(held), 16) for each in (by_hand, twin))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("form", ["turned norms", "keys first"])
def test_other_ways_of_writing_it_give_the_same_graph(
    form: str, twin: onnx.ModelProto, body: Path, tmp_path: Path
) -> None:
    encoder = channels_first.Encoder(turns=form == "turned norms", keys_first=form == "keys first")
    assert operators(float_model(encoder, body, tmp_path / "form")) == operators(twin)


def test_quality_is_that_of_tokens_before_channels(by_hand: onnx.ModelProto, twin: onnx.ModelProto) -> None:
    held, cosines, kept = drawn(48, 2), dict[str, list[float]](), []
    for model in (by_hand, twin):
        observed = calibrate.calibrate(model, drawn(48, 1), 0, lambda *_: None)
        kept.append(channels(observed.statistics))
        reference = embed_batches(FloatSession.of(model), batches(held), 48)
        for scheme in ("w8a8-gemm", "w8a8-int"):
            made = quantize.quantize(observed.model, observed.statistics, schemes.find(scheme, "test"))
            assert len(made.integer_products) >= 12
            vectors = embed_batches(FloatSession.of(made.model), batches(held), 48)
            cosines.setdefault(scheme, []).append(centred_cosine(reference, vectors))
    assert kept[0] == kept[1]
    for one, other in cosines.values():
        assert one > 0.99 and abs(one - other) < 2e-3, cosines


def dense(into: channels_first.Encoder, grouped: channels_first.Encoder) -> None:
    """Give an encoder without groups the weights of one with groups."""
    own = grouped.state_dict()
    for name, value in into.state_dict().items():
        given = own[name]
        if given.shape == value.shape:
            value.copy_(given)
            continue
        value.zero_()
        groups, out = value.shape[1] // given.shape[1], len(given) // (value.shape[1] // given.shape[1])
        for group in range(groups):
            rows = slice(group * out, (group + 1) * out)
            value[rows, group * given.shape[1] : (group + 1) * given.shape[1]] = given[rows]


def channels(statistics: dict[str, Statistics]) -> Counter[tuple[int, int | None, bool]]:
    """Count tensors by the number of their channels, of their mean's, and whether there is a second moment."""
    return Counter(
        (len(seen.minimum), None if seen.mean is None else len(seen.mean), seen.moment is not None)
        for seen in statistics.values()
    )


def test_squeezebert_has_no_convolution_left(body: Path, tmp_path: Path) -> None:
    model = float_model(channels_first.squeezebert(64, 1), body, tmp_path / "squeezebert", "mean")
    found = operators(model)
    assert "Conv" not in found and found["Transpose"] == 4 + 1  # heads, and the mask of the pooling
    observed = calibrate.calibrate(model, drawn(24, 1), 0, lambda *_: None)
    assert all(len(seen.minimum) in (1, 64, 256) for seen in observed.statistics.values())


def test_a_convolution_over_several_tokens_stays_one(body: Path, tmp_path: Path) -> None:
    def before(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())

    model = float_model(channels_first.Encoder(before=before, pooling="max"), body, tmp_path / "wide")
    assert operators(model)["Conv"] == 1 and operators(model)["LayerNormalization"] == 5
    observed = calibrate.calibrate(model, drawn(24, 1), 0, lambda *_: None)
    made = quantize.quantize(observed.model, observed.statistics, schemes.find("w8a8-gemm", "test"))
    held = drawn(32, 2)
    reference, vectors = (
        embed_batches(FloatSession.of(each), batches(held), len(held.ids)) for each in (model, made.model)
    )
    assert centred_cosine(reference, vectors) > 0.99
    with pytest.raises(Unsupported, match="Conv"):
        quantize.quantize(observed.model, observed.statistics, schemes.find("w8a8-int", "test"))


def test_what_padding_moves_is_refused(body: Path, tmp_path: Path) -> None:
    encoder = channels_first.Encoder(before=lambda width: nn.GroupNorm(4, width))
    with pytest.raises(Unsupported, match="padding moves its vectors"):
        float_model(encoder, body, tmp_path / "groups")
