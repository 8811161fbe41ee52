"""What each product's codes cost, measured without them, and the scheme that follows."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest

from edgeq.analysis import layer_errors, scheme_search
from edgeq.calibration.observe import equal_length_batches
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Tokens
from edgeq.errors import ConfigError, EdgeqError
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize, schemes, sensitivity
from edgeq.quantization.schemes import SCHEMES
from edgeq.quantization.sensitivity import Product, Quality

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


@pytest.mark.parametrize("scheme", ["w8a8-gemm", "w8a8-int"])
def test_every_product_is_ranked_and_raising_helps(calibrated: calibrate.Observed, scheme: str) -> None:
    counterpart, model, products = parts(calibrated, scheme)
    found = sensitivity.measure(counterpart, model, SCHEMES[scheme], products, TOKENS, silent)
    assert sorted(item.name for item in found.products) == sorted(products)
    gains = [item.gain for item in found.products]
    assert gains == sorted(gains, reverse=True)
    assert [step.promoted for step in found.steps] == [
        *(2**n for n in range(10) if 2**n < len(products)),
        len(products),
    ]
    assert [name for step in found.steps for name in step.added] == [item.name for item in found.products]
    assert max(step.quality.cosine_mean for step in found.steps) > found.base.cosine_mean
    assert gains[0] > 0.0


def test_without_any_codes_the_gemm_scheme_is_fp32_but_for_its_table(calibrated: calibrate.Observed) -> None:
    counterpart, model, products = parts(calibrated, "w8a8-gemm")
    bare = sensitivity.promoted(model, products, sensitivity._weights(counterpart))
    assert not [node for node in bare.graph.node if node.op_type == "MatMul" and node.input[0].endswith("/dequantized")]
    batches = equal_length_batches(TOKENS, encoder.LONGEST)
    reference, found, coded = (embed_batches(FloatSession.of(m), batches, 12) for m in (counterpart, bare, model))
    lost, lost_with_codes = (1.0 - np.sum(reference * vectors, axis=1) for vectors in (found, coded))
    assert lost.mean() < lost_with_codes.mean() / 3.0


def test_a_product_with_a_wrong_scale_comes_first(calibrated: calibrate.Observed) -> None:
    counterpart, model, products = parts(calibrated, "w8a8-gemm")
    node = next(node for node in model.graph.node if node.name in products and node.name.endswith("ffn_out"))
    made = {output: item for item in model.graph.node for output in item.output}
    scale = made[node.input[0]].input[1]
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == scale)
    array = onnx.numpy_helper.to_array(stored) / 16
    stored.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), scale))
    found = sensitivity.measure(counterpart, model, SCHEMES["w8a8-gemm"], products, TOKENS, silent)
    assert found.products[0].name == node.name
    assert found.products[0].gain > 10 * found.products[1].gain


def test_an_unknown_product_is_named(calibrated: calibrate.Observed) -> None:
    _, model, _ = parts(calibrated, "w8a8-gemm")
    with pytest.raises(EdgeqError, match="no product named nothing"):
        sensitivity.promoted(model, ["nothing"], None)


@pytest.mark.parametrize("scheme", ["w8a8-gemm", "w8a8-int"])
def test_a_promoted_product_changes_the_model_and_nothing_else(calibrated: calibrate.Observed, scheme: str) -> None:
    _, before, products = parts(calibrated, scheme)
    promoted = schemes.promote(SCHEMES[scheme], products[:1])
    assert (promoted.name, promoted.promoted) == (f"{scheme}+1", products[:1])
    after, integer, floats = quantize.quantize(calibrated.model, calibrated.statistics, promoted)
    assert after.SerializeToString(deterministic=True) != before.SerializeToString(deterministic=True)
    if scheme == "w8a8-gemm":
        assert products[0] in floats
        assert integer == products[1:]
    else:
        assert integer == products
        assert floats == ()


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


def test_what_gains_most_for_its_cost_comes_first() -> None:
    quality = Quality(cosine_mean=1.0, cosine_tail=1.0, cosine_min=1.0)
    large = Product(name="large", channels=8, outputs=32, quality=quality, gain=0.003)
    small = Product(name="small", channels=8, outputs=8, quality=quality, gain=0.002)
    worse = Product(name="worse", channels=8, outputs=8, quality=quality, gain=-0.1)

    def cost(outputs: int, size: int, time: float | None) -> scheme_search.Cost:
        return scheme_search.Cost(
            channels=8, outputs=outputs, products=1, extra_bytes=size, extra_ms=time, reason=None if time else "no"
        )

    by_bytes = [cost(32, 400, None), cost(8, 100, None)]
    by_time = [cost(32, 400, 0.1), cost(8, 100, 0.1)]
    assert [item.name for item in scheme_search.by_value([large, small, worse], by_bytes)] == [
        "small",
        "large",
        "worse",
    ]
    assert [item.name for item in scheme_search.by_value([large, small, worse], by_time)] == ["large", "small", "worse"]
