"""Large models: weights in files, mapped, and the same integer model as when all is in memory."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from edgeq.backends.contract import fits_one_file
from edgeq.calibration import file
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.errors import ConfigError, StorageFailed
from edgeq.graph import external_data
from edgeq.graph.float_session import FloatSession
from edgeq.passes import float_passes
from edgeq.pipeline import calibrate
from edgeq.quantization.quantize import quantize
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import FileRef, QdqModel
from edgeq.targets import load_target

TOKENS = Tokens(encoder.tokens(1, 96), 0, 0)


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a model of 100 kB as one that protobuf refuses."""
    monkeypatch.setattr(external_data, "LARGE_BYTES", 100_000)
    monkeypatch.setattr(external_data, "KEPT_BYTES", 4096)


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(external_data.array(tensor)) for tensor in model.graph.initializer}


def saved(folder: Path) -> onnx.ModelProto:
    external_data.save(encoder.encoder(), folder / "model.onnx")
    return external_data.load(folder / "model.onnx")


@pytest.mark.usefixtures("low_limits")
def test_a_large_model_lies_in_two_files_and_comes_back_mapped(tmp_path: Path) -> None:
    made = saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "model.onnx").stat().st_size < 40_000 < (tmp_path / "model.onnx.data").stat().st_size
    outside = [tensor for tensor in made.graph.initializer if external_data.is_external(tensor)]
    assert len(outside) > 8 and all(isinstance(external_data.array(tensor), np.memmap) for tensor in outside)
    assert external_data.is_large(made)
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in encoder.encoder().graph.initializer}
    found = stored(made)
    assert found.keys() == given.keys()
    assert all(np.array_equal(found[name], given[name]) for name in given)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)  # anybody's tools read it


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    made = saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert not any(map(external_data.is_external, made.graph.initializer))


@pytest.mark.usefixtures("low_limits")
def test_equal_models_give_equal_files_and_a_changed_weight_changes_the_models_own_hash(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        saved(tmp_path / name)
    files = [tmp_path / name / f"model.onnx{end}" for name in "ab" for end in ("", external_data.DATA)]
    contents = [path.read_bytes() for path in files]
    assert contents[:2] == contents[2:]
    changed = encoder.encoder()
    tensor = next(item for item in changed.graph.initializer if len(item.raw_data) > 4096)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[-1] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    external_data.save(changed, files[0])
    assert files[0].read_bytes() != contents[0]


@pytest.mark.usefixtures("low_limits")
def test_onnxruntime_gives_the_same_vectors_with_the_weights_outside(tmp_path: Path) -> None:
    made = saved(tmp_path)
    groups = batches(TOKENS)
    inside = embed_batches(FloatSession.of(encoder.encoder()), groups, len(TOKENS))
    for form in (made, tmp_path / "model.onnx"):
        assert np.abs(embed_batches(FloatSession.of(form), groups, len(TOKENS)) - inside).max() < 1e-6


@pytest.mark.usefixtures("low_limits")
def test_a_large_model_calibrates_and_quantises_to_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(tmp_path)
    with external_data.outside(tmp_path / "work"):
        observed = calibrate.calibrate(made, TOKENS, 0, lambda *_: None)
        left = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
        external_data.save(observed.model, tmp_path / "equalized.onnx")
        file.save(observed.statistics, tmp_path / "calibration.npz")
    assert left and not (tmp_path / "work").exists()
    assert any(isinstance(item.moment, np.memmap) for item in observed.statistics.values())
    statistics = file.load(tmp_path / "calibration.npz")
    assert any(isinstance(item.moment, np.memmap) for item in statistics.values())
    with external_data.outside(tmp_path / "work"):
        large, integer, _ = quantize(external_data.load(tmp_path / "equalized.onnx"), statistics, SCHEMES["w8a8-gemm"])
        found = stored(large)
    monkeypatch.undo()
    small = calibrate.calibrate(encoder.encoder(), TOKENS, 0, lambda *_: None)
    wanted, names, _ = quantize(small.model, small.statistics, SCHEMES["w8a8-gemm"])
    assert integer == names
    assert observed.smoothing.alphas == small.smoothing.alphas
    for name, values in stored(wanted).items():
        if name.endswith("/codes"):  # ONNX Runtime sums in another order where it packs no copy of a weight
            assert np.mean(found[name] != values) < 1e-3, name
        else:
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("low_limits")
def test_passes_rewrite_a_large_model_without_taking_it_in(tmp_path: Path) -> None:
    made = saved(tmp_path)
    feeds = Feeds(np.array([[1, 2, 3, 4], [5, 6, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]]))
    with external_data.outside(tmp_path / "work"):
        rewritten, _ = float_passes.rewritten(made, (feeds,))
        assert sum(map(external_data.is_external, rewritten.graph.initializer)) > 8
        assert rewritten.ByteSize() < 60_000
        error = np.abs(FloatSession.of(rewritten)(feeds) - FloatSession.of(encoder.encoder())(feeds)).max()
    assert error < 1e-5


def test_what_passes_by_is_gone(tmp_path: Path) -> None:
    values = np.zeros(external_data.KEPT_BYTES, np.float32)
    with external_data.outside(tmp_path / "work"):
        with external_data.passing():
            tensor = external_data.tensor_of(values, "x")
            assert isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).is_file()
        assert not Path(tensor.path).exists()
    assert isinstance(external_data.tensor_of(values, "x"), ir.Tensor)  # outside of `outside`


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/hostname", "missing.data"])
@pytest.mark.usefixtures("low_limits")
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    saved(folder)
    (tmp_path / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in filter(external_data.is_external, model.graph.initializer):
        tensor.external_data[0].value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="are not in .* beside it"):
        external_data.load(folder / "model.onnx")


@pytest.mark.usefixtures("low_limits")
def test_a_cut_off_file_of_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="fetch both again"):
        external_data.load(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("key", "value"), [("location", None), ("offset", "-4096"), ("offset", "x"), ("length", "4"), ("length", "9" * 30)]
)
@pytest.mark.usefixtures("low_limits")
def test_a_damaged_place_is_refused(tmp_path: Path, key: str, value: str | None) -> None:
    saved(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    tensor = next(filter(external_data.is_external, model.graph.initializer))
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    for name, content in [*kept, *([(key, value)] if value is not None else [])]:
        tensor.external_data.add(key=name, value=content)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="external data|beside it"):
        external_data.load(tmp_path / "model.onnx")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed), external_data.outside(tmp_path / "file" / "work"):
        pass


@pytest.mark.usefixtures("low_limits")
def test_a_large_integer_model_is_refused_and_a_large_float_one_is_not(tmp_path: Path) -> None:
    saved(tmp_path)
    target = load_target("x86-64-onnxruntime")
    record = QdqModel(
        file=FileRef(path=str(tmp_path / "model.onnx"), sha256="0" * 64, size_bytes=1), float_model_sha256="1" * 64,
        calibration_sha256="2" * 64, scheme=SCHEMES["w8a8-gemm"], inputs=("input_ids",), outputs=("out",), dim=1,
        max_sequence=1, integer_matmuls=(), float_matmuls=(),
    )  # fmt: skip
    assert fits_one_file(record, target) == "0.0 GB"
    assert fits_one_file(record.model_copy(update={"float_model_sha256": "0" * 64}), target) is None


def test_bare_models_hold_no_large_weights() -> None:
    model = encoder.encoder()
    big = np.zeros((external_data.KEPT_BYTES,), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(big, "big"))
    bare = external_data.bare(model)
    assert bare.graph.input[-1].name == "big"
    assert bare.graph.input[-1].type.tensor_type.elem_type == TensorProto.FLOAT
    assert [item.name for item in bare.graph.initializer] == [item.name for item in model.graph.initializer][:-1]
