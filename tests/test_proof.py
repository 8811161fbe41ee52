"""A rewrite may move FP32 outputs by the model's own rounding, and by no more: on the noisiest model, too."""

from __future__ import annotations

from collections.abc import Callable

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgeq.calibration.observe import equal_length_batches
from edgeq.data.probes import probe_feeds
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Tokens
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import double_precision, float_noise
from edgeq.graph.edit import Rewrites
from edgeq.graph.float_session import FloatSession
from edgeq.passes.apply import apply_to, without_statistics
from edgeq.passes.proof import FLOOR, Proof
from edgeq.pipeline.equalizing_error import equalizing_error

FEEDS = probe_feeds(encoder.VOCABULARY, 40)
Damage = Callable[[dict[str, np.ndarray]], None]


def noisy(sharpness: float = 256.0) -> onnx.ModelProto:
    """Make attention so sharp that rounding of the scores decides: FP32 is 3e-5 from FP64, of the largest value."""
    return changed(encoder.encoder(), lambda weights: _scale(weights, sharpness, "query.weight"))


def _scale(weights: dict[str, np.ndarray], factor: float, *ends: str) -> None:
    for name in weights:
        if name.endswith(ends):
            weights[name] = weights[name] * np.float32(factor)


def changed(model: onnx.ModelProto, change: Damage) -> onnx.ModelProto:
    weights = {item.name: numpy_helper.to_array(item).copy() for item in model.graph.initializer}
    change(weights)
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def rewrite(change: Damage) -> Callable[[ir.Model], Rewrites]:
    """Make a rewrite that changes weights and says nothing of it."""

    def changing(model: ir.Model) -> Rewrites:
        weights = {str(name): value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
        change(weights)
        for name, value in model.graph.initializers.items():
            value.const_value = ir.Tensor(weights[str(name)], name=str(name))
        return Rewrites(1)

    return changing


def halved(weights: dict[str, np.ndarray]) -> None:
    _scale(weights, 0.5, "layer.0.ffn.weight")


def swapped_rows(weights: dict[str, np.ndarray]) -> None:
    weights["layer.1.ffn.weight"][[0, 1]] = weights["layer.1.ffn.weight"][[1, 0]]


def flipped_sign(weights: dict[str, np.ndarray]) -> None:
    weights["layer.1.value.weight"][:, 3] *= -1


def lost_bias(weights: dict[str, np.ndarray]) -> None:
    weights["layer.1.ffn_out.bias"][:] = 0


def one_channel_scaled(weights: dict[str, np.ndarray]) -> None:
    weights["layer.1.ffn_out.weight"][:, 7] *= np.float32(1.02)


def open_mask(weights: dict[str, np.ndarray]) -> None:
    weights["attention_mask_size"] = np.array(1.0, np.float32)


def not_a_number(weights: dict[str, np.ndarray]) -> None:
    weights["layer.1.ffn_out.bias"][0] = np.nan


DAMAGES = (halved, swapped_rows, flipped_sign, lost_bias, one_channel_scaled, open_mask, not_a_number)


def moved_by_rounding(weights: dict[str, np.ndarray]) -> None:
    """Move a factor from queries to keys, as `fold_attention_scale` does: exact but for rounding."""
    _scale(weights, 3.0, "query.weight", "query.bias")
    _scale(weights, 1 / 3, "key.weight", "key.bias")


def test_the_noisy_model_is_noisy_and_rounding_passes() -> None:
    model = noisy()
    session = FloatSession.of(model)
    noise = float_noise.noise(model, FEEDS, [session.outputs(feed) for feed in FEEDS])["sentence_embedding"]
    assert 1e-5 < noise < 1e-4
    _, (report,) = apply_to(model, FEEDS, (without_statistics(rewrite(moved_by_rounding)),), None)
    assert 1e-5 < report.max_abs_error < float_noise.CEILING  # an absolute 1e-5 refused it


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("sharpness", [1.0, 256.0])
def test_every_damage_shows_on_the_noisiest_model_too(damage: Damage, sharpness: float) -> None:
    with pytest.raises(EdgeqError, match=r"moved the FP32 outputs by .* at most .* FP32 differs from its FP64 by"):
        apply_to(noisy(sharpness), FEEDS, (without_statistics(rewrite(damage)),), None)


EQUAL_LENGTHS = [damage for damage in DAMAGES if damage is not open_mask]  # their batches hold no padding to unmask


def largest_error(before: onnx.ModelProto, after: onnx.ModelProto, held: Tokens) -> float:
    groups = equal_length_batches(held, held.longest)
    return equalizing_error(before, after, groups, embed_batches(FloatSession.of(before), groups, len(held)))


@pytest.mark.parametrize("damage", [None, *EQUAL_LENGTHS], ids=lambda damage: damage.__name__ if damage else "rounding")
def test_equalising_may_move_a_noisy_model_by_its_rounding_and_no_more(damage: Damage | None) -> None:
    held = Tokens(encoder.tokens(1, 32), 0, 0)
    equalized = changed(noisy(2000.0), moved_by_rounding)
    if damage is None:
        assert 1e-5 < largest_error(noisy(2000.0), equalized, held) < float_noise.CEILING
        return
    with pytest.raises(EdgeqError, match=r"equalising moved the FP32 embeddings by .* FP32 differs from its FP64 by"):
        largest_error(noisy(2000.0), changed(equalized, damage), held)


def test_the_noisier_form_of_a_function_says_how_noisy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    noises = iter([{"sentence_embedding": 1e-9}, {"sentence_embedding": 1e-4}])
    monkeypatch.setattr(float_noise, "noise", lambda *_: next(noises))
    rounded = changed(noisy(), moved_by_rounding)
    assert Proof(noisy(), FEEDS).error(rounded, "rounding") > 1e-5


def test_the_tolerance_is_four_times_the_noise_between_its_limits() -> None:
    assert [float_noise.allowed(noise, FLOOR) for noise in (0.0, 1e-8, 1e-6, 1e-3)] == [FLOOR, FLOOR, 4e-6, 1e-4]


def test_noise_is_of_each_output_and_computed_only_when_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("FP64 is not needed")

    model = encoder.encoder()
    monkeypatch.setattr(double_precision, "outputs", never)
    assert Proof(model, FEEDS).error(model, "nothing") == 0.0


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_operators_are_computed_in_fp64(approximate: str) -> None:
    x = np.linspace(-3, 3, 7, dtype=np.float32)[None]
    gelu = helper.make_node("Gelu", ["x"], ["y"], approximate=approximate)
    found = _alone(gelu, x=x)
    assert found.dtype == np.float64 and np.any(found != found.astype(np.float32))
    assert np.array_equal(_alone(helper.make_node("Cast", ["x"], ["y"], to=1), x=found), found)  # FP32 is FP64 here
    many = np.arange(200.0).reshape(1, 100, 2)
    picked = _alone(helper.make_node("GatherElements", ["x", "at"], ["y"], axis=1), x=many, at=np.full((1, 1, 2), 99))
    assert picked.tolist() == [[[198.0, 199.0]]]


def test_an_operator_that_fp64_lacks_is_named() -> None:
    with pytest.raises(Unsupported, match="BiasGelu cannot be computed in FP64"):
        _alone(helper.make_node("BiasGelu", ["x"], ["y"], domain="com.microsoft"), x=np.ones((1, 2), np.float32))


def _alone(node: onnx.NodeProto, **operands: np.ndarray) -> np.ndarray:
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    return double_precision.outputs(helper.make_model(helper.make_graph([node], "g", [], [output])), operands)["y"]
