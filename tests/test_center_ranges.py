"""What 8-bit products read is centred by channel: exact in FP32, with less error behind the products."""

from __future__ import annotations

from functools import partial

import encoder
import numpy as np
import onnx_ir as ir
import pytest

from edgeq.calibration.statistics import Statistics
from edgeq.data.probes import probe_feeds
from edgeq.data.sessions import embed_batches, unit
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import EdgeqError
from edgeq.graph import roles
from edgeq.graph.edit import constant, made_by
from edgeq.graph.float_session import FloatSession
from edgeq.graph.linear import sites, value_projection
from edgeq.graph.roles import Role
from edgeq.passes.apply import apply_to
from edgeq.pipeline import calibrate
from edgeq.quantization.mixed import quantize_mixed
from edgeq.quantization.rewrites import center_ranges as rewrite
from edgeq.quantization.rewrites.center_ranges import RESTORED, center_ranges
from edgeq.quantization.schemes import SCHEMES
from edgeq.system.progress import silent

PASS = partial(center_ranges, scheme=SCHEMES["w8a8-gemm"])
FEEDS = probe_feeds(encoder.VOCABULARY, 40)


@pytest.fixture(scope="module")
def observed() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 96), 0, 0), 0, silent)


def centred(observed: calibrate.Observed) -> tuple[ir.Model, dict[str, Statistics]]:
    statistics = dict(observed.statistics)
    model, (report,) = apply_to(observed.model, FEEDS, (PASS,), statistics)
    assert report.rewrites == 6  # two norms and a context a layer; the last norm is read by the pooling
    return model, statistics


def test_channels_are_centred_and_the_products_keep_their_function(observed: calibrate.Observed) -> None:
    model, statistics = centred(observed)
    before = {site.name: site for site in sites(ir.from_proto(observed.model).graph)}
    found = 0
    for site in sites(model.graph):
        if site.maker == "activation":
            continue
        seen = statistics[site.name]
        middles = np.abs(seen.minimum + seen.maximum) / 2.0
        # A context's middle is that of a range that reaches toward its values'.
        assert middles.max() < (1e-4 if value_projection(site) is None else 0.25) * seen.magnitudes.max()
        assert seen.moment is not None and seen.mean is not None
        assert (np.diag(seen.moment) <= seen.magnitudes**2 * 1.001 + 1e-6).all()
        found += 1
    assert found == 6 == sum(site.maker != "activation" for site in before.values())


def test_a_smoothed_norm_scales_itself_and_the_residual_undoes_it(observed: calibrate.Observed) -> None:
    """No operator is added: the Mul stands in front of the residual sum instead of the products."""
    before = ir.from_proto(observed.model).graph
    smoothed = [node for node in before if roles.has(node, Role.SMOOTHED)]
    model, _ = centred(observed)
    restored = [node for node in model.graph if str(node.outputs[0].name).endswith(RESTORED)]
    assert smoothed and len(restored) == len(smoothed)
    assert not [node for node in model.graph if roles.has(node, Role.SMOOTHED)]
    assert len(list(model.graph)) == len(list(before))
    for node in restored:
        assert made_by(node.inputs[0], "LayerNormalization") is not None
        assert {use.node.op_type for use in node.outputs[0].uses()} == {"Add"}


def test_a_text_that_repeats_one_word_keeps_its_vector(
    observed: calibrate.Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention gives such a text the values themselves, where contexts of other texts are means of many."""
    words = Tokens(tuple((word,) * 40 for word in range(3, encoder.VOCABULARY)), 0, 0)
    fed = batches(words)
    reference = unit(embed_batches(FloatSession.of(observed.model), fed, len(words.ids)))
    worst = {}
    for beyond in (0.0, rewrite.BEYOND):
        monkeypatch.setattr(rewrite, "BEYOND", beyond)
        made = quantize_mixed(observed.model, observed.statistics, SCHEMES["w8a8-gemm"])
        found = unit(embed_batches(FloatSession.of(made.model), fed, len(words.ids)))
        worst[beyond] = 1.0 - float((reference * found).sum(axis=1).min())
    assert worst[rewrite.BEYOND] < 0.6 * worst[0.0]
    assert worst[rewrite.BEYOND] < 0.005


@pytest.mark.parametrize("broken", ["add_to_bias", "shift_input"])
def test_a_shift_that_nothing_undoes_is_found(
    observed: calibrate.Observed, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, broken, lambda *arguments: None)
    with pytest.raises(EdgeqError, match="pass center_ranges: moved the FP32 outputs by"):
        centred(observed)


def test_a_norm_that_something_else_reads_is_left_alone(observed: calibrate.Observed) -> None:
    model = ir.from_proto(observed.model)
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    gain = constant(norm.inputs[1])
    model.graph.outputs.append(norm.outputs[0])
    report = center_ranges(model, dict(observed.statistics), SCHEMES["w8a8-gemm"])
    assert report.count == 5
    assert any("can take in a shift" in line for line in report.near_misses)
    assert gain is not None and np.array_equal(gain, constant(norm.inputs[1]))  # type: ignore[arg-type]


def test_a_one_sided_channel_costs_less_when_it_is_centred() -> None:
    rng = np.random.default_rng(0)
    low, high = -np.ones(32, np.float32), np.ones(32, np.float32)
    low[3], high[3] = 2.0, 6.0
    moment = np.diag(np.r_[np.full(32, 0.1)]).astype(np.float32)
    seen = Statistics(low, high, moment=moment, mean=np.zeros(32, np.float32))
    weight = rng.standard_normal((32, 16)).astype(np.float32)
    reach = {}
    for has_shift in (False, True):
        factor, shift = rewrite._best(seen, [weight], SCHEMES["w8a8-gemm"], has_shift)
        ends = low * factor - shift, high * factor - shift
        reach[has_shift] = (ends[1].max() - ends[0].min()) / factor.min()
    assert reach[True] < reach[False] * 0.8
    assert np.abs(rewrite._best(seen, [weight], SCHEMES["w8a8-gemm"], has_shift=False)[1]).max() == 0.0
