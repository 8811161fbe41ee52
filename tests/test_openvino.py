"""The OpenVINO backend: integer products proved from what runs, vectors of ONNX Runtime's, bytes that do not vary."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest

pytest.importorskip("openvino", reason="needs the extra `openvino`")

from edgeq import targets
from edgeq.analysis.inspect.model_file import inspect
from edgeq.backends import openvino as backend
from edgeq.backends.openvino import lowering
from edgeq.backends.openvino.ir import read_ir
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.errors import ConfigError, DeviceUnavailable, LoweringFailed
from edgeq.evaluation import parity
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import QdqModel, Target
from edgeq.system.files import file_ref

pytestmark = pytest.mark.openvino

TOKENS = Tokens(encoder.tokens(3, 40), 0, 0)
PRODUCTS = 12
CPU = targets.load_target("intel-openvino-cpu")
NPU = targets.load_target("intel-openvino-npu").model_copy(update={"buckets_tokens": (8, 16, 48)})


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def seen() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(dense=True), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


@pytest.fixture(scope="module")
def model(seen: calibrate.Observed, tmp_path_factory: pytest.TempPathFactory) -> QdqModel:
    return quantized(seen, "w8a8-gemm", tmp_path_factory.mktemp("qdq"))


def quantized(seen: calibrate.Observed, name: str, folder: Path) -> QdqModel:
    scheme = SCHEMES[name]
    proto, integer, floats = quantize.quantize(seen.model, seen.statistics, scheme)
    path = folder / "qdq.onnx"
    onnx.save(proto, path)
    return QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=scheme,
        inputs=("input_ids", "attention_mask"), outputs=("sentence_embedding",), dim=encoder.DIM,
        max_sequence=encoder.LONGEST, integer_matmuls=integer, float_matmuls=floats,
    )  # fmt: skip


def edited(model: QdqModel, folder: Path, edit: Callable[[onnx.GraphProto], None]) -> QdqModel:
    proto = onnx.load(model.file.path)
    edit(proto.graph)
    path = folder / "edited.onnx"
    onnx.save(proto, path)
    return model.model_copy(update={"file": file_ref(path)})


def vectors(model: QdqModel, folder: Path, target: Target = CPU) -> Embeddings:
    session = backend.load(backend.lower(model, target, folder), folder, target)
    return embed_batches(session, batches(TOKENS), len(TOKENS.ids))


def mirror(model: QdqModel) -> Embeddings:
    """Run the QDQ model itself in ONNX Runtime, without optimisation."""
    return embed_batches(FloatSession.of(Path(model.file.path), optimize=False), batches(TOKENS), len(TOKENS.ids))


def centred_cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    """Random weights hardly separate texts: what all vectors share is taken away first."""
    first, second = (rows - first.mean(axis=0) for rows in (first, second))
    return np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def test_every_product_of_the_scheme_runs_in_integers(model: QdqModel, tmp_path: Path) -> None:
    found = backend.lower(model, CPU, tmp_path).placement
    assert (found.integer_matmuls, found.float_fallbacks) == (PRODUCTS, ())
    assert found.float_by_scheme == model.float_matmuls


def test_a_product_whose_activations_are_not_quantised_is_named(model: QdqModel, tmp_path: Path) -> None:
    def leave_float(graph: onnx.GraphProto) -> None:
        product = next(node for node in graph.node if node.name == "layer.1.ffn")
        made = {output: node for node in graph.node for output in node.output}
        quantize = made[made[product.input[0]].input[0]]
        product.input[0] = quantize.input[0]

    found = backend.lower(edited(model, tmp_path, leave_float), CPU, tmp_path).placement
    assert found.float_fallbacks == ("layer.1.ffn",)
    assert found.integer_matmuls == PRODUCTS - 1
    static = backend.lower(edited(model, tmp_path, leave_float), NPU, tmp_path / "npu").placement
    assert static.float_fallbacks == ("layer.1.ffn",)


def test_vectors_are_those_of_the_qdq_model(model: QdqModel, tmp_path: Path) -> None:
    assert centred_cosines(mirror(model), vectors(model, tmp_path)).min() > 0.999


def test_a_wrong_scale_shows(model: QdqModel, tmp_path: Path) -> None:
    def shrink(graph: onnx.GraphProto) -> None:
        scale = next(item for item in graph.initializer if item.name == "layer.1.gelu/scale")
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) / 8, scale.name))

    assert centred_cosines(mirror(model), vectors(edited(model, tmp_path, shrink), tmp_path)).mean() < 0.99


def test_a_text_has_one_vector_at_every_padding(model: QdqModel, tmp_path: Path) -> None:
    session = backend.load(backend.lower(model, CPU, tmp_path), tmp_path, CPU)
    assert parity.invariance(session, TOKENS, encoder.LONGEST) > 0.99999


def test_scales_for_each_token_stay_integer_products_with_the_same_vectors(
    seen: calibrate.Observed, tmp_path: Path
) -> None:
    found, target = quantized(seen, "w8a8-dynamic", tmp_path), targets.load_target("intel-openvino-cpu-dynamic")
    assert backend.rejections(found, target) == ()
    artifact = backend.lower(found, target, tmp_path / "ir")
    assert (artifact.placement.integer_matmuls, artifact.placement.float_fallbacks) == (PRODUCTS, ())
    session = backend.load(artifact, tmp_path / "ir", target)
    run = embed_batches(session, batches(TOKENS), len(TOKENS.ids))
    assert centred_cosines(mirror(found), run).min() > 0.999
    assert parity.invariance(session, TOKENS, encoder.LONGEST) > 0.99999
    (refused,) = backend.rejections(found, NPU)
    assert "scales for each token" in refused.rule and "w8a8-dynamic" in refused.detail


@pytest.mark.parametrize("is_padded", [True, False])
def test_probabilities_do_not_depend_on_padding_to_the_bit(model: QdqModel, is_padded: bool) -> None:
    """Without padded keys the plugin's sums of what is left over differ in the last bits."""
    import openvino as ov

    read = lowering.read_qdq(Path(model.file.path), has_dynamic_keys=is_padded)
    softmaxes = [item for item in read.get_ordered_ops() if item.get_type_name() == "Softmax"]
    assert len(softmaxes) == 2
    whole = ov.Model([item.output(0) for item in softmaxes], read.get_parameters(), "probabilities")
    compiled = ov.Core().compile_model(whole, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(ids: np.ndarray, width: int) -> list[np.ndarray]:
        feeds = np.zeros((2, 1, width), np.int64)
        feeds[0, 0, : len(ids)], feeds[1, 0, : len(ids)] = ids, 1
        found = compiled({"input_ids": feeds[0], "attention_mask": feeds[1]})
        return [np.array(array)[:, :, : len(ids), : len(ids)] for array in found.values()]

    rng = np.random.default_rng(5)
    differing = 0
    for length in range(17, 47):
        ids = rng.integers(1, encoder.VOCABULARY, length)
        pairs = zip(run(ids, length), run(ids, encoder.LONGEST), strict=True)
        differing += sum(not np.array_equal(alone, padded) for alone, padded in pairs)
    assert (differing == 0) is is_padded


def test_keys_are_turned_inside_the_product(model: QdqModel) -> None:
    import openvino as ov

    raw = ov.Core().read_model(model.file.path)
    assert lowering.turn_keys_inside(raw) == 2
    assert lowering.turn_keys_inside(raw) == 0


def test_lowering_gives_the_same_bytes_whatever_ran_before(model: QdqModel, tmp_path: Path) -> None:
    """OpenVINO numbers its operations from the start of the process: another process counts from elsewhere."""
    backend.lower(model, CPU, tmp_path / "first")
    backend.lower(model, CPU, tmp_path / "second")
    program = (
        "import sys\nfrom pathlib import Path\nfrom edgeq.backends.openvino import lowering\n"
        "xml, weights = lowering.serialized(lowering.read_qdq(Path(sys.argv[1]), has_dynamic_keys=True))\n"
        "Path(sys.argv[2], 'third.xml').write_bytes(xml)\nPath(sys.argv[2], 'third.bin').write_bytes(weights)\n"
    )
    subprocess.run([sys.executable, "-c", program, model.file.path, str(tmp_path)], check=True)
    for suffix in ("xml", "bin"):
        files = [tmp_path / folder / f"openvino/openvino_model.{suffix}" for folder in ("first", "second")]
        contents = {path.read_bytes() for path in (*files, tmp_path / f"third.{suffix}")}
        assert len(contents) == 1


def test_buckets_are_static_and_share_one_bin(model: QdqModel, tmp_path: Path) -> None:
    artifact = backend.lower(model, NPU, tmp_path)
    names = [Path(file.path).name for file in artifact.files]
    assert names == [f"openvino_model_seq_{size}.xml" for size in (48, 16, 8)] + ["openvino_model_seq.bin"]
    for size in (8, 16, 48):
        network = read_ir(tmp_path / f"openvino/openvino_model_seq_{size}.xml")
        assert {layer.outputs[0].shape for layer in network.of("Parameter")} == {(1, size)}
        assert all(-1 not in port.shape for layer in network.layers.values() for port in layer.outputs)
    assert (artifact.placement.integer_matmuls, artifact.placement.float_fallbacks) == (PRODUCTS, ())


def test_static_forms_run_on_the_cpu_as_evidence_and_not_as_the_device(model: QdqModel, tmp_path: Path) -> None:
    artifact = backend.lower(model, NPU, tmp_path)
    (setting,) = backend.other_settings(artifact, tmp_path, NPU)
    assert setting.session is not None and setting.ran_on == "host-kernels"
    found = embed_batches(setting.session, batches(TOKENS), len(TOKENS.ids))
    assert centred_cosines(mirror(model), found).min() > 0.999
    with pytest.raises(ConfigError, match="largest bucket holds 48"):
        setting.session(Feeds(np.ones((1, 49), np.int64), np.ones((1, 49), np.int64)))


@pytest.mark.skipif(backend.obstacle(NPU) is None, reason="an NPU is here")
def test_without_the_device_loading_says_so(model: QdqModel, tmp_path: Path) -> None:
    artifact = backend.lower(model, NPU, tmp_path)
    with pytest.raises(DeviceUnavailable, match="finds no NPU with a driver"):
        backend.load(artifact, tmp_path, NPU)


def test_the_other_precision_is_measured_or_says_why_not(
    model: QdqModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = backend.lower(model, CPU, tmp_path)
    (setting,) = backend.other_settings(artifact, tmp_path, CPU)
    assert setting.name == "inference_precision_hint=bf16"
    assert (setting.session is None) == (setting.reason is not None)
    if setting.session is not None:
        found = embed_batches(setting.session, batches(TOKENS), len(TOKENS.ids))
        assert centred_cosines(mirror(model), found).mean() > 0.99
    import openvino as ov

    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32", "INT8"])
    (setting,) = backend.other_settings(artifact, tmp_path, CPU)
    assert setting.session is None and "this CPU has no bf16" in str(setting.reason)


def test_dynamic_quantisation_is_off_in_the_file_itself(model: QdqModel, tmp_path: Path) -> None:
    import openvino as ov

    backend.lower(model, CPU, tmp_path)
    compiled = ov.Core().compile_model(tmp_path / "openvino/openvino_model.xml", "CPU")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def garbage(xml: Path) -> None:
    xml.write_text("<net>", encoding="utf-8")


def no_weights(xml: Path) -> None:
    xml.with_suffix(".bin").unlink()


def short_weights(xml: Path) -> None:
    weights = xml.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:1000])


def other_shape(xml: Path) -> None:
    text = xml.read_text(encoding="utf-8")
    assert 'shape="300, 64"' in text
    xml.write_text(text.replace('shape="300, 64"', 'shape="300, 63"'), encoding="utf-8")


def other_input(xml: Path) -> None:
    xml.write_text(xml.read_text(encoding="utf-8").replace("input_ids", "pixels"), encoding="utf-8")


def other_output(xml: Path) -> None:
    xml.write_text(xml.read_text(encoding="utf-8").replace("sentence_embedding", "logits"), encoding="utf-8")


@pytest.mark.parametrize("damage", [garbage, no_weights, short_weights, other_shape, other_input, other_output])
def test_an_ir_edited_by_hand_is_one_message(model: QdqModel, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    artifact = backend.lower(model, CPU, tmp_path)
    damage(tmp_path / artifact.files[0].path)
    with pytest.raises(ConfigError, match="openvino_model"):
        backend.load(artifact, tmp_path, CPU)


def test_an_operator_that_openvino_lacks_is_named(model: QdqModel, tmp_path: Path) -> None:
    def replace(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "Gelu")
        node.op_type, node.domain = "Hardened", "some.domain"

    with pytest.raises(LoweringFailed, match="Hardened"):
        backend.lower(edited(model, tmp_path, replace), CPU, tmp_path)


def test_rules_name_what_is_wrong(model: QdqModel) -> None:
    integer = model.model_copy(update={"scheme": SCHEMES["w8a8-int"], "integer_matmuls": ("a,b",)})
    runtime = {**CPU.runtime, "inference_precision_hint": "f8", "stream": 1}
    wrong = CPU.model_copy(update={"buckets_tokens": (16,), "runtime": runtime})
    details = [item.detail for item in backend.rejections(integer, wrong)]
    assert details == [
        "missing or unknown: stream", "scheme w8a8-int leaves nothing float", "scheme w8a8-int has int8 activations",
        "buckets_tokens is [16]", "product 'a,b'",
    ]  # fmt: skip
    hint = CPU.model_copy(update={"runtime": {**CPU.runtime, "inference_precision_hint": "f8"}})
    assert [item.detail for item in backend.rejections(model, hint)] == ["inference_precision_hint is 'f8'"]
    lost = CPU.model_copy(update={"runtime": {**CPU.runtime, "device": "TPU"}})
    assert backend.rejections(model, lost)[0].detail == "device is 'TPU'"
    static = NPU.model_copy(update={"buckets_tokens": ()})
    assert [item.detail for item in backend.rejections(model, static)] == ["buckets_tokens is []"]
    assert backend.rejections(model, CPU) == backend.rejections(model, NPU) == ()


def test_inspect_shows_an_ir(model: QdqModel, tmp_path: Path) -> None:
    artifact = backend.lower(model, CPU, tmp_path)
    found = inspect(tmp_path / artifact.files[0].path)
    assert found.operators["MatMul"]["uint8 x int8"] == PRODUCTS
    assert found.tensors["int8"].count >= PRODUCTS
    assert found.size_bytes == sum(file.size_bytes for file in artifact.files)
    assert [port.name for port in found.inputs] == ["input_ids", "attention_mask"]
    assert found.inputs[0].shape == ("?", "?")
    assert found.outputs[0].name == "sentence_embedding"
    no_weights(tmp_path / artifact.files[0].path)
    with pytest.raises(ConfigError, match="is not there"):
        inspect(tmp_path / artifact.files[0].path)
