"""The TFLite backend: every scale is the QDQ model's, nothing is float, and its vectors are those of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

from ai_edge_litert import schema_py_generated as schema

from edgeq import calibrate, parity, quantize, targets
from edgeq.backends import tflite
from edgeq.backends.contract import Embeddings, embed_batches
from edgeq.backends.tflite import kernels
from edgeq.backends.tflite.emitter import Settings
from edgeq.backends.tflite.lowering import lower_model
from edgeq.errors import ConfigError, LoweringFailed
from edgeq.records import QdqModel, Target
from edgeq.reference import FloatSession
from edgeq.schemes import SCHEMES
from edgeq.storage import file_ref
from edgeq.texts import Feeds, Tokens, batches

pytestmark = pytest.mark.tflite

BUCKETS = (8, 16, 48)
TOKENS = Tokens(encoder.tokens(3, 40), 0, 0)
PLAIN, OLDER = Settings(32, "quantize", "none"), Settings(32, "cast", "all")


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def calibrated() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


@pytest.fixture(scope="module", params=["w8a8-int", "w8a16-int"])
def model(
    request: pytest.FixtureRequest, calibrated: calibrate.Observed, tmp_path_factory: pytest.TempPathFactory
) -> QdqModel:
    scheme = SCHEMES[request.param]
    proto, integer, floats = quantize.quantize(calibrated.model, calibrated.statistics, scheme)
    path = tmp_path_factory.mktemp("qdq") / "qdq.onnx"
    onnx.save(proto, path)
    return QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=scheme,
        inputs=("input_ids", "attention_mask"), outputs=("sentence_embedding",), dim=encoder.DIM,
        max_sequence=encoder.LONGEST, integer_matmuls=integer, float_matmuls=floats,
    )  # fmt: skip


def target(scheme: str, **runtime: object) -> Target:
    found = targets.load_target("integer-only-w8a16")
    return found.model_copy(
        update={"scheme": scheme, "buckets_tokens": BUCKETS, "runtime": {**found.runtime, **runtime}}
    )


def lowered(model: QdqModel, settings: Settings = PLAIN) -> bytes:
    return lower_model(ir.load(model.file.path), BUCKETS, settings)


def session(model: QdqModel, folder: Path, **runtime: object) -> tflite.TfliteSession:
    wanted = target(model.scheme.name, **runtime)
    return tflite.load(tflite.lower(model, wanted, folder), folder, wanted)


def cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    return np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def mirror(model: QdqModel) -> Embeddings:
    """Run the QDQ model itself in ONNX Runtime, without optimisation."""
    return embed_batches(FloatSession.of(Path(model.file.path), optimize=False), batches(TOKENS), len(TOKENS.ids))


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
    proto = onnx.load(model.file.path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    wanted: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = stored[node.input[1]].reshape(-1)
        zero_point = stored[node.input[2]].reshape(-1) if len(node.input) > 2 else np.zeros(scale.shape, np.int64)
        name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        wanted[name.removesuffix("/quantized")] = scale, zero_point
    for node in proto.graph.node:
        if node.op_type == "Gather" and node.output[0] in wanted:
            wanted[node.input[0]] = wanted[node.output[0]]
    # What lowering adds between: the same codes in another shape, the mask before it is scaled, the share of a token.
    added = ("/rows", "/column", "/flat", "/shaped", "/mask", "/table", "shares/16bit/inverse", "/one_over_count")
    compared = set()
    for signature, name, scale, zero_point in quantised_tensors(lowered(model)):
        if name.endswith(added) or name.startswith("ones_"):
            continue
        assert name in wanted, (signature, name)
        np.testing.assert_array_equal(scale, wanted[name][0], err_msg=name)
        np.testing.assert_array_equal(zero_point, wanted[name][1], err_msg=name)
        compared.add(name)
    assert len(compared) > 120


@pytest.mark.parametrize("settings", [PLAIN, OLDER], ids=["plain", "older"])
def test_nothing_is_float_and_every_kernel_is_known(model: QdqModel, settings: Settings) -> None:
    runtime = "litert" if settings is PLAIN else "tflite-runtime"
    assert kernels.violations(lowered(model, settings), runtime) == []


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
    assert parity.invariance(run, TOKENS, encoder.LONGEST, BUCKETS) > 0.999


def test_a_swapped_bucket_shows(model: QdqModel, tmp_path: Path) -> None:
    wanted = target(model.scheme.name)
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
    proto = onnx.load(model.file.path)
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "layer.1.gelu/scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 8, scale.name))
    path = tmp_path / "wrong.onnx"
    onnx.save(proto, path)
    wrong = model.model_copy(update={"file": file_ref(path)})
    found = embed_batches(session(wrong, tmp_path), batches(TOKENS), len(TOKENS.ids))
    assert cosines(mirror(model), found).mean() < 0.99


def test_a_dropped_operator_is_refused(model: QdqModel, tmp_path: Path) -> None:
    claimed = model.model_copy(update={"integer_matmuls": (*model.integer_matmuls, "one.more")})
    with pytest.raises(LoweringFailed, match="products were written"):
        tflite.lower(claimed, target(model.scheme.name), tmp_path)


def test_a_sum_that_would_abort_the_kernel_is_refused(model: QdqModel, tmp_path: Path) -> None:
    proto = onnx.load(model.file.path)
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == "embedded/scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 1e6, scale.name))
    path = tmp_path / "small.onnx"
    onnx.save(proto, path)
    with pytest.raises(LoweringFailed, match="which is no power of two"):
        tflite.lower(model.model_copy(update={"file": file_ref(path)}), target(model.scheme.name), tmp_path)


def test_an_operator_without_tflite_form_is_named(model: QdqModel, tmp_path: Path) -> None:
    proto = onnx.load(model.file.path)
    next(node for node in proto.graph.node if node.op_type == "Gelu").op_type = "Sigmoid"
    path = tmp_path / "sigmoid.onnx"
    onnx.save(proto, path)
    with pytest.raises(LoweringFailed, match="Sigmoid has no TFLite form"):
        tflite.lower(model.model_copy(update={"file": file_ref(path)}), target(model.scheme.name), tmp_path)


def test_rules_name_what_is_wrong(model: QdqModel) -> None:
    gemm = model.model_copy(update={"scheme": SCHEMES["w8a8-gemm"]})
    wrong = target(model.scheme.name, upcast="hope").model_copy(update={"buckets_tokens": ()})
    details = [item.detail for item in tflite.rejections(gemm, wrong)]
    assert details == ["scheme w8a8-gemm leaves tensors in float", "buckets_tokens is []", "upcast is 'hope'"]
    assert tflite.rejections(model, target(model.scheme.name)) == ()


def test_a_text_beyond_the_largest_bucket_is_refused(model: QdqModel, tmp_path: Path) -> None:
    ids = np.ones((1, BUCKETS[-1] + 1), np.int64)
    with pytest.raises(ConfigError, match="largest bucket holds 48"):
        session(model, tmp_path)(Feeds(ids, np.ones_like(ids)))


def test_a_file_that_is_no_model_is_a_message(model: QdqModel, tmp_path: Path) -> None:
    wanted = target(model.scheme.name)
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
