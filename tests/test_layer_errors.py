from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import make_bundle

from edgeq.analysis import layer_errors
from edgeq.analysis.layer_errors import LayerErrors, TensorError
from edgeq.bundle.manifest import load_report
from edgeq.calibration import file
from edgeq.calibration.observe import equal_length_batches
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Tokens
from edgeq.errors import EdgeqError
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.quantization.schemes import SCHEMES
from edgeq.reports.bundles import Found
from edgeq.reports.layers import layers
from edgeq.system.files import file_ref

TOKENS = Tokens(encoder.tokens(3, 12), 0, 0)
STREAM = ("embedded", "layer.0.sum", "layer.0.sum2", "layer.1.sum", "layer.1.sum2", "sentence_embedding")


@pytest.fixture(scope="module")
def calibrated() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, lambda *_: None)


def measured(calibrated: calibrate.Observed, scheme: str, qdq: onnx.ModelProto | None = None) -> LayerErrors:
    chosen = SCHEMES[scheme]
    counterpart = layer_errors.counterpart(calibrated.model, calibrated.statistics, chosen)
    model = qdq or quantize.quantize(calibrated.model, calibrated.statistics, chosen)[0]
    stream = layer_errors.residual_stream(calibrated.model)
    tensors = layer_errors.measure(counterpart, model, TOKENS, stream)
    return LayerErrors(scheme=scheme, texts=len(TOKENS.ids), tensors=tensors)


def test_the_stream_is_what_the_norms_read(calibrated: calibrate.Observed) -> None:
    assert layer_errors.residual_stream(calibrated.model) == STREAM


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_scheme_shows_the_same_stream_with_small_errors(calibrated: calibrate.Observed, scheme: str) -> None:
    found = measured(calibrated, scheme)
    assert tuple(tensor.name for tensor in found.stream) == STREAM
    assert len(found.tensors) > len(STREAM)
    # 4 bits are 17 times as coarse as 8, and what they take from a product's mean comes back in the bias behind it.
    largest, largest_of_stream = (0.2, 0.15) if SCHEMES[scheme].weight_bits > 4 else (0.5, 0.5)
    for tensor in found.tensors:
        assert 0.0 <= tensor.relative_error < largest, tensor
        assert tensor.cosine_min <= tensor.cosine_mean <= 1.0
    for tensor in found.stream:
        # A vendor's compiler rounds for itself: the model that it is given is float.
        low, high = (-1.0, 1e-5) if not QUANTIZERS[SCHEMES[scheme].kind].writes_integers else (0.0, largest_of_stream)
        assert low < tensor.relative_error < high, tensor


def test_more_bits_err_less(calibrated: calibrate.Observed) -> None:
    narrow, wide = (measured(calibrated, scheme).stream[-1] for scheme in ("w8a8-int", "w8a16-int"))
    assert wide.relative_error < narrow.relative_error
    assert wide.cosine_mean > narrow.cosine_mean


@pytest.mark.parametrize("scheme", ["w8a8-gemm", "w8a8-int"])
def test_the_counterpart_is_the_same_function(calibrated: calibrate.Observed, scheme: str) -> None:
    counterpart = layer_errors.counterpart(calibrated.model, calibrated.statistics, SCHEMES[scheme])
    batches = equal_length_batches(TOKENS, encoder.LONGEST)
    before, after = (embed_batches(FloatSession.of(m), batches, 12) for m in (calibrated.model, counterpart))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_a_model_against_itself_has_no_error(calibrated: calibrate.Observed) -> None:
    rewritten = layer_errors.counterpart(calibrated.model, calibrated.statistics, SCHEMES["w8a8-gemm"])
    for tensor in measured(calibrated, "w8a8-gemm", rewritten).tensors:
        assert tensor.relative_error == 0.0
        assert tensor.cosine_min == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_scale_shows_where_it_is(calibrated: calibrate.Observed, layer: int) -> None:
    model, _, _ = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES["w8a8-gemm"])
    scale = next(item for item in model.graph.initializer if item.name == f"layer.{layer}.out.weight/scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(3.0), scale.name))
    found = measured(calibrated, "w8a8-gemm", model)
    assert found.entry is not None
    assert found.entry.name == f"layer.{layer}.sum"
    assert f"layer.{layer}.out" in found.entry.label
    by_name = {tensor.name: tensor.relative_error for tensor in found.tensors}
    whole = {tensor.name: tensor.relative_error for tensor in measured(calibrated, "w8a8-gemm").tensors}
    assert by_name["embedded"] == whole["embedded"]
    assert by_name[f"layer.{layer}.out.product"] > 1.0


def test_codes_count_where_all_readers_see_them(calibrated: calibrate.Observed) -> None:
    model, _, _ = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES["w8a8-int"])
    after = next(node for node in model.graph.node if node.input[0] == "layer.1.sum2/quantized")
    model.graph.initializer.append(numpy_helper.from_array(np.array(7.0, np.float32), "wrong"))
    after.input[1] = "wrong"  # the sum itself stays as it is: only what its codes stand for is wrong
    found = {tensor.name: tensor.relative_error for tensor in measured(calibrated, "w8a8-int", model).tensors}
    assert found["layer.1.sum2"] > 1.0
    assert found["layer.1.sum"] < 0.15


def test_models_without_a_common_tensor_and_nan_are_refused(calibrated: calibrate.Observed) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    other = helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "other", [x], [y]))
    with pytest.raises(EdgeqError, match="no tensor in common"):
        measured(calibrated, "w8a8-gemm", other)
    broken = onnx.ModelProto()
    broken.CopyFrom(calibrated.model)
    bias = next(item for item in broken.graph.initializer if item.name.endswith("layer.1.ffn.bias"))
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    with pytest.raises(EdgeqError, match=r"layer\.1\.ffn\S*: holds NaN or infinity"):
        measured(calibrated, "w8a8-gemm", broken)


def test_a_card_measures_each_model_once_and_says_what_the_cache_lacks(
    calibrated: calibrate.Observed, tmp_path: Path
) -> None:
    scheme = SCHEMES["w8a8-gemm"]
    cache = tmp_path / "cache"
    files = {name: cache / "kind" / "entry" / name for name in ("equalized.onnx", "qdq.onnx", "calibration.npz")}
    cache.joinpath("kind", "entry").mkdir(parents=True)
    onnx.save(calibrated.model, files["equalized.onnx"])
    onnx.save(quantize.quantize(calibrated.model, calibrated.statistics, scheme)[0], files["qdq.onnx"])
    file.save(calibrated.statistics, files["calibration.npz"])
    refs = {name: file_ref(path) for name, path in files.items()}
    path, manifest = make_bundle(tmp_path / "out")
    manifest = manifest.model_copy(
        update={
            "equalized_model": manifest.equalized_model.model_copy(update={"file": refs["equalized.onnx"]}),
            "qdq_model": manifest.qdq_model.model_copy(update={"file": refs["qdq.onnx"], "scheme": scheme}),
            "calibration": manifest.calibration.model_copy(update={"file": refs["calibration.npz"]}),
        }
    )
    both = [Found(name, path, manifest, load_report(path)) for name in ("one", "two")]
    (item,) = layers(both, TOKENS, cache)
    assert item.names == ("one", "two")
    assert item.errors is not None and tuple(tensor.name for tensor in item.errors.stream) == STREAM
    assert item.errors.tensors == measured(calibrated, "w8a8-gemm").tensors
    files["qdq.onnx"].unlink()
    (item,) = layers(both, TOKENS, cache)
    assert item.errors is None
    assert item.reason is not None and f"QDQ model (sha256 {refs['qdq.onnx'].sha256[:12]}" in item.reason
    assert "equalised" not in item.reason


def test_the_angle_decides_where_the_error_enters() -> None:
    def tensor(name: str, relative: float, cosine: float, is_stream: bool = True) -> TensorError:
        return TensorError(
            name=name, after="w", is_stream=is_stream, relative_error=relative, cosine_mean=cosine, cosine_min=cosine
        )

    tensors = (
        tensor("a", 0.5, 0.999),
        tensor("inner", 0.9, 0.1, False),
        tensor("b", 0.1, 0.98),
        tensor("c", 0.3, 0.979),
    )
    entry = LayerErrors(scheme="s", texts=1, tensors=tensors).entry
    assert entry is not None and entry.name == "b"
    assert LayerErrors(scheme="s", texts=1, tensors=()).entry is None
