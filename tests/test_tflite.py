"""The TFLite backend: every scale is the QDQ model's, nothing is float, and its vectors are those of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_integer import BUCKETS, TOKENS, cosines, is_added, make_model, make_target, meant, mirror, with_wrong_scale

pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

from ai_edge_litert import schema_py_generated as schema

from edgeq.backends import tflite
from edgeq.backends.tflite import data_movement, kernels
from edgeq.backends.tflite.emitter import Settings
from edgeq.backends.tflite.lowering import lower_model
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Feeds, batches
from edgeq.errors import ConfigError, LoweringFailed, UnsupportedRange
from edgeq.evaluation import parity
from edgeq.graph.edit import add_constant
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import QdqModel
from edgeq.system.files import file_ref

pytestmark = pytest.mark.tflite

PLAIN, OLDER = Settings(32, "quantize", "none"), Settings(32, "cast", "all", is_bias_stated=False)


@pytest.fixture(scope="module", params=["w8a8-int", "w8a8-int-npu", "w8a16-int"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QdqModel:
    return make_model(request.param, tmp_path_factory.mktemp("qdq"))


def lowered(model: QdqModel, settings: Settings = PLAIN) -> bytes:
    return lower_model(ir.load(model.file.path), BUCKETS, settings)


def session(model: QdqModel, folder: Path, **runtime: object) -> tflite.TfliteSession:
    wanted = make_target(model.scheme.name, **runtime)
    return tflite.load(tflite.lower(model, wanted, folder), folder, wanted)


def quantised_tensors(data: bytes) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    read = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    for graph in read.subgraphs:
        for tensor in graph.tensors:
            if tensor.quantization is not None and tensor.quantization.scale is not None:
                yield (
                    graph.name.decode(),
                    tensor.name.decode(),
                    tensor.quantization.scale,
                    tensor.quantization.zeroPoint,
                )


def test_every_scale_and_zero_point_is_the_qdq_models(model: QdqModel) -> None:
    wanted = meant(model)
    compared = set()
    for signature, name, scale, zero_point in quantised_tensors(lowered(model)):
        if is_added(name):
            continue
        assert name in wanted, (signature, name)
        np.testing.assert_array_equal(scale, wanted[name].scale, err_msg=name)
        np.testing.assert_array_equal(zero_point, wanted[name].zero_point, err_msg=name)
        compared.add(name)
    assert len(compared) > 120


@pytest.mark.parametrize("settings", [PLAIN, OLDER], ids=["plain", "older"])
def test_nothing_is_float_and_every_kernel_is_known(model: QdqModel, settings: Settings) -> None:
    runtime = "litert" if settings is PLAIN else "tflite-runtime"
    found = kernels.violations(kernels.read(lowered(model, settings)), runtime)
    if settings is OLDER and model.scheme.name == "w8a8-int-npu":  # its 16-bit copies have a step of their own
        assert found
        assert all("QUANTIZE version 1 from int8 to int16" in violation for violation in found)
    else:
        assert found == []


def test_the_npu_scheme_leaves_out_what_npus_lack(model: QdqModel) -> None:
    data = lower_model(ir.load(model.file.path), BUCKETS[-1:], PLAIN)
    found = {item.name for item in kernels.read(data).operators if item.dtypes[-1] == "int16"}
    lacking = {"BATCH_MATMUL", "GATHER", "GELU"} & found
    assert lacking == set() if model.scheme.name == "w8a8-int-npu" else lacking >= {"BATCH_MATMUL", "GELU"}


def test_buckets_share_weights_and_the_largest_comes_first(model: QdqModel) -> None:
    one = len(lower_model(ir.load(model.file.path), BUCKETS[-1:], PLAIN))
    data = lowered(model)
    assert len(data) < 1.6 * one  # of a model whose weights are a third of its file
    read = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    assert [item.signatureKey.decode() for item in read.signatureDefs] == ["seq_48", "seq_16", "seq_8"]
    assert [item.subgraphIndex for item in read.signatureDefs] == [0, 1, 2]


def test_lowering_twice_gives_the_same_bytes(model: QdqModel) -> None:
    assert lowered(model) == lowered(model)


@pytest.mark.parametrize("runtime", [{}, {"upcast": "cast", "lookup": "all"}], ids=["plain", "older"])
def test_vectors_are_those_of_the_qdq_model(model: QdqModel, tmp_path: Path, runtime: dict[str, object]) -> None:
    found = embed_batches(session(model, tmp_path, **runtime), batches(TOKENS), len(TOKENS.ids))
    near = cosines(mirror(model), found)
    assert near.mean() > (0.9995 if model.scheme.name == "w8a16-int" else 0.997)


def test_a_text_has_one_vector_in_every_bucket(model: QdqModel, tmp_path: Path) -> None:
    run = session(model, tmp_path)
    least = 0.999 if model.scheme.name == "w8a8-int-npu" else 0.999999  # whatever is masked has exactly 0
    assert parity.invariance(run, TOKENS, encoder.LONGEST, BUCKETS) > least


def test_a_swapped_bucket_shows(model: QdqModel, tmp_path: Path) -> None:
    wanted = make_target(model.scheme.name)
    artifact = tflite.lower(model, wanted, tmp_path)
    path = tmp_path / artifact.files[0].path
    read = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
    for item in read.signatureDefs:
        item.subgraphIndex = {0: 1, 1: 0, 2: 2}[item.subgraphIndex]
        graph = read.subgraphs[item.subgraphIndex]
        for ports, indices in ((item.inputs, graph.inputs), (item.outputs, graph.outputs)):
            for port, index in zip(ports, indices, strict=True):
                port.tensorIndex = index
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(read.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(builder.Output())
    run = tflite.load(artifact, tmp_path, wanted)
    with pytest.raises(LoweringFailed, match=r"int32\[1, 16\]; int32\[1, 48\] is needed"):
        embed_batches(run, batches(TOKENS), len(TOKENS.ids))


def test_a_wrong_scale_shows(model: QdqModel, tmp_path: Path) -> None:
    wrong = with_wrong_scale(model, "layer.1.gelu", 1 / 8, tmp_path / "wrong.onnx")
    found = embed_batches(session(wrong, tmp_path), batches(TOKENS), len(TOKENS.ids))
    assert cosines(mirror(model), found).mean() < 0.99


def test_a_dropped_operator_is_refused(model: QdqModel, tmp_path: Path) -> None:
    claimed = model.model_copy(update={"integer_matmuls": (*model.integer_matmuls, "one.more")})
    with pytest.raises(LoweringFailed, match="products were written"):
        tflite.lower(claimed, make_target(model.scheme.name), tmp_path)


def test_a_sum_that_would_abort_the_kernel_is_refused(model: QdqModel, tmp_path: Path) -> None:
    small = with_wrong_scale(model, "embedded", 1e-6, tmp_path / "small.onnx")
    with pytest.raises((LoweringFailed, UnsupportedRange), match="which is no power of two|too large for its result's"):
        tflite.lower(small, make_target(model.scheme.name), tmp_path)


def test_an_operator_without_tflite_form_is_named(model: QdqModel, tmp_path: Path) -> None:
    proto = onnx.load(model.file.path)
    next(node for node in proto.graph.node if node.op_type == "Gelu").op_type = "Erf"
    path = tmp_path / "erf.onnx"
    onnx.save(proto, path)
    with pytest.raises(LoweringFailed, match="Erf has no TFLite form"):
        tflite.lower(model.model_copy(update={"file": file_ref(path)}), make_target(model.scheme.name), tmp_path)


def test_rules_name_what_is_wrong(model: QdqModel) -> None:
    gemm = model.model_copy(update={"scheme": SCHEMES["w8a8-gemm"]})
    wrong = make_target(model.scheme.name, upcast="hope").model_copy(update={"buckets_tokens": ()})
    details = [item.detail for item in tflite.rejections(gemm, wrong)]
    assert details == ["scheme w8a8-gemm leaves tensors in float", "buckets_tokens is []", "upcast is 'hope'"]
    assert tflite.rejections(model, make_target(model.scheme.name)) == ()


def test_a_text_beyond_the_largest_bucket_is_refused(model: QdqModel, tmp_path: Path) -> None:
    ids = np.ones((1, BUCKETS[-1] + 1), np.int64)
    with pytest.raises(ConfigError, match="largest bucket holds 48"):
        session(model, tmp_path)(Feeds(ids, np.ones_like(ids)))


def test_a_file_that_is_no_model_is_a_message(model: QdqModel, tmp_path: Path) -> None:
    wanted = make_target(model.scheme.name)
    artifact = tflite.lower(model, wanted, tmp_path)
    path = tmp_path / artifact.files[0].path
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(LoweringFailed):
        tflite.load(artifact, tmp_path, wanted)


def test_time_and_memory_are_the_childs(model: QdqModel, tmp_path: Path) -> None:
    run = session(model, tmp_path)
    ids = np.ones((2, 16), np.int64)
    milliseconds = run.milliseconds(Feeds(ids, np.ones_like(ids)), 3, 1)
    assert len(milliseconds) == 3
    assert min(milliseconds) > 0.0
    assert run.peak_memory_bytes() > 10_000_000


def test_first_tokens_of_different_widths_have_sizes_of_their_own() -> None:
    stored: dict[str, np.ndarray] = {}
    found: list[list[int]] = []

    class Emit:
        settings = PLAIN
        out = SimpleNamespace(constant=lambda name, array: stored.setdefault(name, array))

        def read(self, value: ir.Value) -> SimpleNamespace:
            return SimpleNamespace(shape=(1, 8, int(str(value.name))))

        def write(self, value: object, shape: object, code: int, version: int, inputs: list[Any], *_: object) -> None:
            found.append(inputs[2].tolist())

    graph = ir.Graph([], [], nodes=[])
    bounds = [add_constant(graph, name, np.array([at], np.int64)) for name, at in (("a", 0), ("b", 1), ("c", 1))]
    for width in (64, 192):
        node = ir.node("Slice", [ir.Value(name=str(width)), *bounds], name=f"first_of_{width}")
        data_movement._first_row(Emit(), node)  # type: ignore[arg-type]
    assert found == [[1, 1, 64], [1, 1, 192]]
