"""Calibrating, equalising and quantising a small encoder: exactness, quality, and what the checks catch."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeq.calibration import file, outlier_neurons, smooth_scales
from edgeq.calibration import observe as observe_module
from edgeq.calibration.observe import equal_length_batches, observe
from edgeq.calibration.statistics import Histogram, Statistics
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import ConfigError, EdgeqError
from edgeq.graph import roles
from edgeq.graph.float_session import FloatSession
from edgeq.graph.linear import sites
from edgeq.graph.roles import Role
from edgeq.pipeline import calibrate
from edgeq.pipeline.calibrate import Observed
from edgeq.quantization import range_groups, ranges, weight_rounding
from edgeq.quantization.quantize import quantize
from edgeq.quantization.rewrites.split_ranges import WIDE
from edgeq.quantization.schemes import SCHEMES

W8A8 = SCHEMES["w8a8-gemm"]


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def centred_cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    """Compare after subtracting the mean: random encoders hardly separate texts."""
    a, b = (x.astype(np.float64) - first.mean(0) for x in (first, second))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return encoder.encoder()


@pytest.fixture(scope="module")
def observed(model: onnx.ModelProto) -> Observed:
    return calibrate.calibrate(model, Tokens(encoder.tokens(1, 96), 0, 0), 0, silent)


@pytest.fixture(scope="module")
def held_out() -> Tokens:
    return Tokens(encoder.tokens(2, 64), 0, 0)


def embed(model: onnx.ModelProto, tokens: Tokens) -> Embeddings:
    return embed_batches(FloatSession.of(model), batches(tokens), len(tokens.ids))


def test_equalising_keeps_the_function(model: onnx.ModelProto, observed: Observed, held_out: Tokens) -> None:
    assert np.abs(embed(model, held_out) - embed(observed.model, held_out)).max() < 1e-5
    assert observed.max_abs_error < 1e-5


def test_massive_neurons_leave_the_integer_product_where_there_are_any(observed: Observed) -> None:
    graph = ir.from_proto(observed.model).graph
    side = [node for node in graph if roles.has(node, Role.OUTLIER_BRANCH) and node.op_type == "MatMul"]
    assert len(side) == 2
    assert all(str(node.name).startswith("layer.0.") for node in side)
    hidden = {s.name[:7]: s.weights()[0].shape for s in sites(graph) if "gelu" in s.name}
    assert hidden == {
        "layer.0": (encoder.HIDDEN - outlier_neurons.BRANCH_WIDTH, encoder.DIM),
        "layer.1": (encoder.HIDDEN, encoder.DIM),
    }


def test_observing_in_parts_finds_the_same(
    model: onnx.ModelProto, held_out: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = ir.from_proto(model).graph
    names = [*(site.name for site in sites(graph)), *smooth_scales.score_tensors(graph)]
    batches = equal_length_batches(held_out, encoder.LONGEST)
    read = names[:2]

    def found() -> tuple[dict[str, Statistics], int]:
        runs: list[int] = []
        kept = observe(model, names, batches, lambda done, total: runs.append(total), histograms=read, moments=read)
        return kept, runs[-1]

    whole, runs = found()
    monkeypatch.setattr("edgeq.calibration.observe.GROUP_BYTES", 2 * 4 * encoder.LONGEST * encoder.HIDDEN)
    parts, more = found()
    assert more >= 2 * runs
    assert list(parts) == list(whole) == names
    for name in names:
        for array in ("minimum", "maximum", "moment", "mean"):
            first, second = getattr(whole[name], array), getattr(parts[name], array)
            assert (first is None) == (second is None)
            assert first is None or np.array_equal(first, second)
    scores = names[-1]
    assert whole[scores].minimum.shape == (1,)
    session = observe_module.observing(model, [scores])
    seen = [session.run([scores], batch.feeds)[0] for batch in batches]
    assert whole[scores].minimum[0] == min(array.min() for array in seen)
    assert whole[scores].maximum[0] == max(array.max() for array in seen)


def test_attention_makes_the_memory_of_observing_grow_with_the_square(model: onnx.ModelProto) -> None:
    short, long = (observe_module.peak_bytes(model, tokens) for tokens in (1024, 4096))
    assert long - short == 3 * encoder.HEADS * (4096**2 - 1024**2) * 4


def test_integer_products_are_near_fp32(model: onnx.ModelProto, observed: Observed, held_out: Tokens) -> None:
    quantized, integer, floats = quantize(observed.model, observed.statistics, W8A8)
    cosines = centred_cosines(embed(model, held_out), embed(quantized, held_out))
    assert len({name.removesuffix(WIDE) for name in integer}) == 12
    assert set(floats) == {
        node.name
        for node in ir.from_proto(quantized).graph
        if roles.has(node, Role.OUTLIER_BRANCH) and node.op_type == "MatMul"
    }
    assert cosines.mean() > 0.99
    assert cosines.min() > 0.9  # one of 64 random texts lies near the mean, where a centred cosine says little


def test_quantising_without_equalising_is_worse(
    model: onnx.ModelProto, observed: Observed, held_out: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_groups, "LEAST", np.inf)  # which would serve the outlier neurons of the plain model, too
    names = [site.name for site in sites(ir.from_proto(model).graph)]
    plain = observe(model, names, equal_length_batches(Tokens(encoder.tokens(1, 96), 0, 0), 48), lambda d, t: None)
    reference = embed(model, held_out)
    without = centred_cosines(reference, embed(quantize(model, plain, W8A8)[0], held_out)).mean()
    ours = centred_cosines(reference, embed(quantize(observed.model, observed.statistics, W8A8)[0], held_out)).mean()
    assert 1 - ours < 0.5 * (1 - without)


def test_one_wrong_scale_shows(model: onnx.ModelProto, observed: Observed, held_out: Tokens) -> None:
    quantized, _, _ = quantize(observed.model, observed.statistics, W8A8)
    scale = next(t for t in quantized.graph.initializer if t.name.endswith("layer.1.ffn.weight/scale"))
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    assert centred_cosines(embed(model, held_out), embed(quantized, held_out)).mean() < 0.99


def test_dense_after_pooling_stays_float() -> None:
    model = encoder.encoder(dense=True)
    seen = calibrate.calibrate(model, Tokens(encoder.tokens(1, 32), 0, 0), 0, silent)
    _, integer, floats = quantize(seen.model, seen.statistics, W8A8)
    assert "dense" in floats and "dense" not in integer


def test_quantising_twice_gives_the_same_bytes(observed: Observed) -> None:
    made = [
        quantize(observed.model, observed.statistics, W8A8)[0].SerializeToString(deterministic=True) for _ in range(2)
    ]
    assert made[0] == made[1]


def test_missing_statistics_are_named(observed: Observed) -> None:
    fewer = dict(observed.statistics)
    name = next(name for name in fewer if name.startswith("layer.1.gelu"))
    del fewer[name]
    with pytest.raises(EdgeqError, match=r"layer\.1\.gelu"):
        quantize(observed.model, fewer, W8A8)


def test_padding_never_counts(model: onnx.ModelProto) -> None:
    made = equal_length_batches(Tokens(encoder.tokens(3, 40), 0, 0), 48)
    assert all(batch.feeds.attention_mask.all() for batch in made)
    assert sorted(row for batch in made for row in batch.rows) == list(range(40))
    assert max(batch.feeds.input_ids.size for batch in made) <= 48


def test_too_few_texts_are_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        calibrate.calibrate(model, Tokens(encoder.tokens(1, 5), 0, 0), 0, silent)


def test_statistics_survive_the_file(observed: Observed, tmp_path: Path) -> None:
    file.save(observed.statistics, tmp_path / "a.npz")
    file.save(observed.statistics, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read = file.load(tmp_path / "a.npz")
    assert read.keys() == observed.statistics.keys()
    for name, item in observed.statistics.items():
        assert np.array_equal(read[name].minimum, item.minimum) and np.array_equal(read[name].maximum, item.maximum)
        assert (read[name].moment is None) == (item.moment is None)
        assert item.histogram is None or np.array_equal(item.histogram.counts, read[name].histogram.counts)  # type: ignore[union-attr]


def test_a_cut_off_statistics_file_is_refused(observed: Observed, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    file.save(observed.statistics, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="not a calibration file"):
        file.load(path)


def test_the_histogram_counts_every_value_and_grows() -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    parts = [rng.standard_normal(5000).astype(np.float32) * scale for scale in (0.1, 1.0, 30.0)]
    for part in parts:
        histogram.add(part, float(np.abs(part).max()))
    every = np.concatenate(parts)
    assert histogram.counts.sum() == every.size
    width = histogram.limit / 2048
    inside = histogram.counts[np.abs(ranges.centres(histogram)) < 1.0].sum()
    assert abs(int(inside) - int((np.abs(every) < 1.0).sum())) <= (np.abs(np.abs(every) - 1.0) < 2 * width).sum()


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_range_methods_leave_a_lone_outlier_out(method: str) -> None:
    histogram, rng = Histogram(), np.random.default_rng(0)
    values = np.append(rng.standard_normal(400_000), 300.0).astype(np.float32)
    histogram.add(values, 300.0)
    statistics = Statistics(values.min(keepdims=True), values.max(keepdims=True), histogram)
    low, high = ranges.choose(statistics, W8A8.model_copy(update={"range_method": method}))
    assert ranges.choose(statistics, W8A8)[1] == 300.0
    assert 3.0 < high < 290.0 and low < -3.0


def test_compensated_rounding_beats_nearest_on_correlated_inputs() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 8)) @ rng.standard_normal((8, 96)) + 0.1 * rng.standard_normal((4000, 96))).astype(
        np.float32
    )
    weight = rng.standard_normal((96, 32)).astype(np.float32)
    moment = (x.T @ x / len(x)).astype(np.float32)
    errors = []
    for codes, scales in (weight_rounding.nearest(weight, 6), weight_rounding.compensated(weight, moment, 0.01, 6)):
        errors.append(float(np.square(x @ (codes * scales - weight)).mean()))
        assert np.abs(codes.astype(int)).max() <= 31
    assert errors[1] < 0.5 * errors[0]


def test_the_mask_follows_the_scores(model: onnx.ModelProto, observed: Observed) -> None:
    size = next(t for t in observed.model.graph.initializer if t.name == "attention_mask_size")
    assert 30.0 < float(onnx.numpy_helper.to_array(size)) < 1000.0


def test_weights_of_a_tensor_that_is_zero_are_rounded_to_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    values, scales = weight_rounding.compensated(weight, np.zeros((16, 16), np.float32), 1e-160, 8)
    assert np.abs(values * scales - weight).max() <= scales.max() / 2 * 1.001
