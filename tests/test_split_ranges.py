"""Neurons with wide ranges get a scale of their own, where the predicted error of the product falls enough."""

from __future__ import annotations

from functools import partial

import encoder
import numpy as np
import onnx_ir as ir
import pytest

from edgeq.calibration.statistics import Statistics
from edgeq.data.probes import probe_feeds
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Tokens
from edgeq.graph.edit import Rewrites
from edgeq.graph.float_session import FloatSession
from edgeq.passes.apply import apply_to
from edgeq.pipeline import calibrate
from edgeq.quantization import range_groups
from edgeq.quantization.mixed import quantize_mixed
from edgeq.quantization.rewrites.split_ranges import WIDE, split_ranges
from edgeq.quantization.schemes import SCHEMES
from edgeq.system.progress import silent

SCHEME = SCHEMES["w8a8-gemm"]


@pytest.fixture(scope="module")
def observed() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 96), 0, 0), 0, silent)


def seen(wide: int, neurons: int = 64, widest: float = 10.0) -> Statistics:
    """Give statistics of independent neurons, of which some have a wide range and all a variance of 0.04."""
    high = np.ones(neurons, np.float32)
    high[5 : 5 + wide] = widest
    moment = 0.04 * np.eye(neurons, dtype=np.float32)
    return Statistics(np.full(neurons, -0.2, np.float32), high, moment=moment, mean=np.zeros(neurons, np.float32))


WEIGHT = np.ones((64, 16), np.float32)


def test_neurons_with_wide_ranges_are_chosen_in_blocks_and_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    (chosen,) = range_groups.groups(seen(8), WEIGHT)
    assert len(chosen) == range_groups.WIDTH
    assert set(range(5, 13)) <= set(chosen.tolist())
    assert range_groups.groups(seen(0), WEIGHT) == []
    assert range_groups.groups(seen(8, widest=1.3), WEIGHT) == []
    assert range_groups.groups(seen(3, neurons=20), np.ones((20, 16), np.float32)) == []  # no block fits
    # (10.2**2 - 1.2**2) / 12 / 255**2 x 48 of 64 rows is taken away, of a variance of 0.04 x 64
    taken = (10.2**2 - 1.2**2) / 12 / 255**2 * 48 / (0.04 * 64)
    monkeypatch.setattr(range_groups, "LEAST", taken * 1.01)
    assert range_groups.groups(seen(8), WEIGHT) == []
    monkeypatch.setattr(range_groups, "LEAST", taken * 0.99)
    assert len(range_groups.groups(seen(8), WEIGHT)) == 1


def always(statistics: Statistics, weight: np.ndarray) -> list[np.ndarray]:
    return [np.sort(np.argsort(-(statistics.maximum - statistics.minimum))[:32])]


def test_a_split_block_keeps_its_function_and_its_statistics(observed: calibrate.Observed) -> None:
    statistics = dict(observed.statistics)
    model, (report,) = apply_to(
        observed.model, probe_feeds(encoder.VOCABULARY, 40), (partial(split_ranges, choose=always),), statistics
    )
    assert report.rewrites == 2
    for layer in ("layer.0", "layer.1"):
        (product,) = [node for node in model.graph if node.name == f"{layer}.ffn_out{WIDE}"]
        (rest,) = [node for node in model.graph if node.name == f"{layer}.ffn_out"]
        names = [str(node.inputs[0].name) for node in (product, rest)]  # type: ignore[union-attr]
        parts = [statistics[name] for name in names]
        before = observed.statistics[names[1]]
        assert len(parts[0].maximum) + len(parts[1].maximum) == len(before.maximum)
        assert sorted([*parts[0].maximum, *parts[1].maximum]) == sorted(before.maximum)
        assert parts[0].maximum.max() == before.maximum.max()
        for part in parts:
            assert part.moment is not None and part.mean is not None
            np.testing.assert_allclose(np.sqrt(np.diag(part.moment)) <= part.magnitudes + 1e-6, True)


def test_a_wrong_split_is_found(observed: calibrate.Observed) -> None:
    def lossy(model: ir.Model, statistics: dict[str, Statistics]) -> Rewrites:
        split_ranges(model, statistics, always)
        name, value = next((n, v) for n, v in model.graph.initializers.items() if n.endswith(f"ffn_out.weight{WIDE}"))
        array = value.const_value.numpy().copy()  # type: ignore[union-attr]
        array[0] = 0.0
        value.const_value = ir.Tensor(array, name=name)
        return Rewrites(1)

    with pytest.raises(Exception, match="pass lossy: moved the FP32 outputs"):
        apply_to(observed.model, probe_feeds(encoder.VOCABULARY, 40), (lossy,), dict(observed.statistics))


def test_two_scales_lose_less_than_one_on_a_block_with_outliers(
    observed: calibrate.Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = dict(observed.statistics)
    (hidden,) = [name for name in statistics if name.endswith("layer.0.gelu")]
    wide = statistics[hidden]
    factor = np.ones(len(wide.maximum), np.float32)
    factor[:16] = 12.0
    statistics[hidden] = Statistics(wide.minimum, wide.maximum * factor, moment=wide.moment, mean=wide.mean)
    held = Tokens(encoder.tokens(7, 64), 0, 0)
    batches = held.batches(16, 16 * encoder.LONGEST)

    def lost(least: float) -> float:
        monkeypatch.setattr(range_groups, "LEAST", least)
        model = quantize_mixed(observed.model, statistics, SCHEME)[0]
        found, reference = (embed_batches(FloatSession.of(each), batches, 64) for each in (model, observed.model))
        return float(((found - reference) ** 2).mean())

    assert lost(range_groups.LEAST) < lost(np.inf) / 1.3
