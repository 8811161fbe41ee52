"""What each product's codes cost, measured without them, and the scheme that follows."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest

from edgeq.analysis import layer_errors, scheme_search
from edgeq.data.batches import Batch
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import ConfigError, EdgeqError
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize, schemes, sensitivity, weight_losses
from edgeq.quantization.schemes import SCHEMES
from edgeq.quantization.sensitivity import Site

TOKENS = Tokens(encoder.tokens(3, 12), 0, 0)


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def calibrated() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


def parts(calibrated: calibrate.Observed, scheme: str) -> tuple[onnx.ModelProto, onnx.ModelProto, tuple[str, ...]]:
    chosen = SCHEMES[scheme]
    model, products, _ = quantize.quantize(calibrated.model, calibrated.statistics, chosen)
    return layer_errors.counterpart(calibrated.model, calibrated.statistics, chosen), model, products


@pytest.mark.parametrize("scheme", ["w8a8-gemm", "w8a8-dynamic", "w8a8-int", "w8a8-htp"])
def test_every_product_is_ranked_once(calibrated: calibrate.Observed, scheme: str) -> None:
    counterpart, model, products = parts(calibrated, scheme)
    found = sensitivity.measure(counterpart, model, SCHEMES[scheme], products, TOKENS, silent)
    assert sorted(name for site in found.sites for name in site.names) == sorted(products)
    losses = [site.loss for site in found.sites]
    assert losses == sorted(losses, reverse=True)
    assert min(losses) > 0.0
    count = len(found.sites)
    assert [step.promoted for step in found.steps] == [*(2**n for n in range(10) if 2**n < count), count]
    assert [name for step in found.steps for name in step.added] == [
        name for site in found.sites for name in site.names
    ]
    assert found.steps[-1].loss == found.rest


def test_queries_keys_and_values_are_one_site(calibrated: calibrate.Observed) -> None:
    counterpart, model, products = parts(calibrated, "w8a8-gemm")
    found = sensitivity.measure(counterpart, model, SCHEMES["w8a8-gemm"], products, TOKENS, silent)
    (site,) = [site for site in found.sites if "layer.0.key" in site.names]
    assert site.names == ("layer.0.query", "layer.0.key", "layer.0.value")
    assert (site.channels, site.outputs) == (64, 3 * 64)


def test_losses_add_up_to_that_of_the_model(calibrated: calibrate.Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "PROBED", 400)  # random weights: a few texts would show noise
    counterpart, model, products = parts(calibrated, "w8a8-gemm")
    tokens = Tokens(encoder.tokens(3, 400), 0, 0)
    found = sensitivity.measure(counterpart, model, SCHEMES["w8a8-gemm"], products, tokens, silent)
    assert found.loss == pytest.approx(found.rest + sum(site.loss for site in found.sites), rel=0.25)
    assert found.share_left(()) == pytest.approx(1.0)
    assert found.share_left(found.sites) == pytest.approx(found.rest / found.loss)


def test_with_all_switches_closed_the_model_is_itself_and_open_it_has_no_codes(calibrated: calibrate.Observed) -> None:
    _, model, products = parts(calibrated, "w8a8-gemm")
    batches = sensitivity.probes(TOKENS)
    session = FloatSession.of(sensitivity.with_switches(model, [[name] for name in products]), optimize=False)

    def embed(switch: float) -> np.ndarray:
        switches = np.full(len(products) + 1, switch, np.float32)
        feeds = [Batch(batch.rows, sensitivity.SwitchedFeeds(batch.feeds, switches)) for batch in batches]
        return embed_batches(session, feeds, sensitivity.PROBED)

    coded, uncoded = (
        embed_batches(FloatSession.of(m, optimize=False), batches, sensitivity.PROBED)
        for m in (model, without_codes(model))
    )
    np.testing.assert_array_equal(embed(0.0), coded)
    np.testing.assert_allclose(embed(1.0), uncoded, atol=1e-6)
    assert np.abs(coded - uncoded).max() > 1e-3


def without_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model with its activations in float: its weights keep their codes."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    real = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in bare.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in real:
            node.CopyFrom(onnx.helper.make_node("Identity", [real[node.input[0]]], list(node.output)))
    return bare


def test_a_product_with_a_wrong_scale_comes_first(calibrated: calibrate.Observed) -> None:
    counterpart, model, products = parts(calibrated, "w8a8-gemm")
    node = next(node for node in model.graph.node if node.name in products and node.name.endswith("ffn_out"))
    made = {output: item for item in model.graph.node for output in item.output}
    scale = made[node.input[0]].input[1]
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == scale)
    array = onnx.numpy_helper.to_array(stored) / 16
    stored.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), scale))
    found = sensitivity.measure(counterpart, model, SCHEMES["w8a8-gemm"], products, TOKENS, silent)
    assert found.sites[0].names == (node.name,)
    assert found.sites[0].loss > 10 * found.sites[1].loss


def planted(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Make one weight of each output channel 60 times as large as the rest, in another input channel each time."""
    (stored,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    weight = onnx.numpy_helper.to_array(stored).copy()
    channels, outputs = weight.shape
    weight[7 * np.arange(outputs) % channels, np.arange(outputs)] = 60 * weight.std() * (-1.0) ** np.arange(outputs)
    stored.CopyFrom(onnx.numpy_helper.from_array(weight, name))
    return model


def test_weights_with_outliers_lose_most_and_float_they_lose_nothing() -> None:
    model = planted(encoder.encoder(), "layer.0.out.weight")
    found = calibrate.calibrate(model, Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)
    counterpart, coded, products = parts(found, "w8a8-gemm")
    groups = [[name] for name in products]
    losses = weight_losses.measure(counterpart, coded, groups, TOKENS, silent)
    by_loss = sorted(zip(losses, products, strict=True), reverse=True)
    assert by_loss[0][1] == "layer.0.out" and by_loss[0][0] > 2 * by_loss[1][0]

    held, lost = Tokens(encoder.tokens(3, 96), 0, 0), []
    reference = embed_batches(FloatSession.of(model), batches(held), len(held.ids))
    for floats in ([], ["layer.0.out"]):
        scheme = schemes.promote(SCHEMES["w8a8-gemm"], set(products) - set(floats), floats, has_float_tables=True)
        made = quantize.quantize(found.model, found.statistics, scheme).model
        vectors = embed_batches(FloatSession.of(made), batches(held), len(held.ids))
        lost.append(sensitivity.loss(reference, reference, vectors))
    assert lost[1] < 0.7 * lost[0]


def test_coded_weights_are_those_of_the_qdq_model(calibrated: calibrate.Observed) -> None:
    counterpart, model, products = parts(calibrated, "w8a8-gemm")
    probes = sensitivity.probes(TOKENS)
    session = FloatSession.of(
        weight_losses.with_coded_weights(counterpart, model, [[name] for name in products]), optimize=False
    )

    def embed(switch: float) -> np.ndarray:
        switches = np.full(len(products), switch, np.float32)
        feeds = [Batch(batch.rows, sensitivity.SwitchedFeeds(batch.feeds, switches)) for batch in probes]
        return embed_batches(session, feeds, sensitivity.PROBED)

    real = embed_batches(FloatSession.of(counterpart, optimize=False), probes, sensitivity.PROBED)
    np.testing.assert_array_equal(embed(0.0), real)
    scheme = schemes.promote(SCHEMES["w8a8-gemm"], (), (), has_float_tables=True)
    coded = without_codes(quantize.quantize(calibrated.model, calibrated.statistics, scheme).model)
    found = embed_batches(FloatSession.of(coded, optimize=False), probes, sensitivity.PROBED)
    np.testing.assert_allclose(embed(1.0), found, atol=1e-6)
    assert np.abs(found - real).max() > 1e-3
    with pytest.raises(EdgeqError, match="no product with stored codes is named nothing"):
        weight_losses.with_coded_weights(counterpart, model, [["nothing"]])


def test_products_and_tables_that_stay_float_leave_fp32(calibrated: calibrate.Observed) -> None:
    _, products, floats = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES["w8a8-gemm"])
    scheme = schemes.promote(SCHEMES["w8a8-gemm"], (), products, has_float_tables=True)
    model, integer, kept = quantize.quantize(calibrated.model, calibrated.statistics, scheme)
    assert integer == () and set(kept) == {*products, *floats}
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    vectors = [
        embed_batches(FloatSession.of(each), batches(TOKENS), len(TOKENS.ids)) for each in (encoder.encoder(), model)
    ]
    np.testing.assert_allclose(*vectors, atol=1e-5)


def test_an_unknown_product_is_named(calibrated: calibrate.Observed) -> None:
    counterpart, model, _ = parts(calibrated, "w8a8-gemm")
    with pytest.raises(EdgeqError, match="no product named nothing"):
        sensitivity.measure(counterpart, model, SCHEMES["w8a8-gemm"], ["nothing"], TOKENS, silent)


def test_probes_are_texts_of_all_lengths_without_padding() -> None:
    tokens = Tokens(tuple((101, *range(length), 102) for length in (1, 3, 4, 9, 60, 90, 100, 2)), 0, 0)
    batches = sensitivity.probes(tokens)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(8))
    assert all(batch.feeds.named(["attention_mask"])["attention_mask"].all() for batch in batches)
    assert max(batch.feeds.named(["input_ids"])["input_ids"].shape[1] for batch in batches) <= 32
    assert all((batch.feeds.named(["input_ids"])["input_ids"][:, -1] == 102).all() for batch in batches)


@pytest.mark.parametrize("scheme", ["w8a8-gemm", "w8a8-int"])
def test_a_promoted_product_changes_the_model_and_nothing_else(calibrated: calibrate.Observed, scheme: str) -> None:
    before, products, floats_before = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES[scheme])
    promoted = schemes.promote(SCHEMES[scheme], products[:1])
    assert (promoted.name, promoted.promoted) == (f"{scheme}+1", products[:1])
    after, integer, floats = quantize.quantize(calibrated.model, calibrated.statistics, promoted)
    assert after.SerializeToString(deterministic=True) != before.SerializeToString(deterministic=True)
    assert floats == floats_before
    assert integer == ((products[0], f"{products[0]}/rest", *products[1:]) if scheme == "w8a8-gemm" else products)


@pytest.mark.parametrize("scheme", ["w8a8-gemm", "w8a8-gemm-7bit", "w8a8-dynamic"])
def test_promoted_products_lose_what_their_weights_lose(calibrated: calibrate.Observed, scheme: str) -> None:
    _, coded, products = parts(calibrated, scheme)
    promoted, integer, _ = quantize.quantize(
        calibrated.model, calibrated.statistics, schemes.promote(SCHEMES[scheme], products)
    )
    assert len(integer) == 2 * len(products)
    batches = sensitivity.probes(TOKENS)
    of_weights, of_both, found = (
        embed_batches(FloatSession.of(model, optimize=False), batches, sensitivity.PROBED)
        for model in (without_codes(coded), coded, promoted)
    )
    lost, lost_unpromoted = (np.abs(vectors - of_weights).max() for vectors in (found, of_both))
    assert lost < lost_unpromoted / 5.0
    sizes = [sum(item.ByteSize() for item in model.graph.initializer) for model in (coded, promoted)]
    assert sizes[1] < sizes[0] * 1.02


def test_a_scheme_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "scheme.json"
    scheme = schemes.promote(SCHEMES["w8a8-gemm"], ["b", "a"])
    path.write_text(scheme.model_dump_json())
    assert schemes.read(path) == scheme
    assert schemes.promote(scheme, []) == SCHEMES["w8a8-gemm"]


def test_a_scheme_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scheme.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        schemes.read(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no scheme"):
        schemes.read(path)
    other = SCHEMES["w8a8-gemm"].model_copy(update={"weight_bits": 4})
    path.write_text(other.model_dump_json())
    with pytest.raises(ConfigError, match="differs from those of this edgeq"):
        schemes.read(path)


def test_what_costs_most_for_its_price_comes_first() -> None:
    large = Site(names=("large",), channels=8, outputs=32, loss=0.003)
    small = Site(names=("small",), channels=8, outputs=8, loss=0.002)
    least = Site(names=("least",), channels=8, outputs=8, loss=0.0)

    def cost(outputs: int, size: int, time: float | None) -> scheme_search.Cost:
        return scheme_search.Cost(
            channels=8, outputs=outputs, sites=1, extra_bytes=size, extra_ms=time, reason=None if time else "no"
        )

    by_bytes = [cost(32, 400, None), cost(8, 100, None)]
    by_time = [cost(32, 400, 0.1), cost(8, 100, 0.1)]
    assert scheme_search.by_value([large, small, least], by_bytes) == [small, large, least]
    assert scheme_search.by_value([large, small, least], by_time) == [large, small, least]
