"""The Rockchip backend with the real compiler and simulator: 8 bits where they are asked for, vectors of FP32."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest
import tiny_integer
from onnx import numpy_helper

from edgeq import targets
from edgeq.backends import rockchip
from edgeq.backends.contract import TimesItself
from edgeq.backends.rockchip import compiler_log
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import BundleCorrupt, LoweringFailed, ToolMissing
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import stage_functions
from edgeq.quantization import quantize
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import Artifact, QdqModel, Target
from edgeq.system import environments, host
from edgeq.system.files import file_ref

BUCKETS = (16,)
TOKENS = Tokens(tuple(ids[:16] for ids in encoder.tokens(3, 12)), 0, 0)
Lowered = dict[str, tuple[Artifact, Path, QdqModel]]


@pytest.fixture(scope="module")
def toolkit() -> Path:
    """Make the environment, once for this user, or skip with the reason why it cannot be made."""
    try:
        return environments.interpreter(rockchip.TOOLKIT)
    except ToolMissing as error:
        pytest.skip(str(error))


def make_model(scheme_name: str, folder: Path) -> QdqModel:
    scheme, observed = SCHEMES[scheme_name], tiny_integer.calibrated()
    proto, integer, floats = quantize.quantize(observed.model, observed.statistics, scheme)
    path, feeds = folder / "qdq.onnx", folder / "feeds.json"
    onnx.save(proto, path)
    feeds.write_text(json.dumps(stage_functions.spaced_by_length(encoder.tokens(1, 64), 8)), encoding="utf-8")
    return QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=scheme,
        inputs=("input_ids", "attention_mask"), outputs=("sentence_embedding",), dim=encoder.DIM,
        max_sequence=encoder.LONGEST, integer_matmuls=integer, float_matmuls=floats,
        feeds=file_ref(feeds) if scheme.feeds else None,
    )  # fmt: skip


def make_target(name: str = "rk3588", **changes: object) -> Target:
    return targets.load_target(name).model_copy(update={"buckets_tokens": BUCKETS, **changes})


def reference() -> Embeddings:
    return embed_batches(FloatSession.of(encoder.encoder()), batches(TOKENS), len(TOKENS.ids))


def centred_cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    """Compare without what all texts share: random encoders give vectors that lie close together."""
    mean = first.mean(0)
    return tiny_integer.cosines(first - mean, second - mean)


@pytest.fixture(scope="module")
def lowered(toolkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    made = {}
    for scheme, name in (("rockchip-int8", "rk3588"), ("rockchip-float16", "rk3588-float16")):
        folder = tmp_path_factory.mktemp(name)
        model = make_model(scheme, tmp_path_factory.mktemp(f"{name}-model"))
        made[name] = (rockchip.lower(model, make_target(name), folder), folder, model)
    return made


def embed(artifact: Artifact, folder: Path, wanted: Target) -> Embeddings:
    session = rockchip.load(artifact, folder, wanted)
    assert not isinstance(session, TimesItself)  # a simulator's time is nobody's latency
    return embed_batches(session, batches(TOKENS), len(TOKENS.ids))


@pytest.mark.rockchip
@pytest.mark.parametrize(("name", "mean", "low"), [("rk3588", 0.98, 0.93), ("rk3588-float16", 0.9999, 0.9999)])
def test_built_again_they_give_fp32s_vectors(lowered: Lowered, name: str, mean: float, low: float) -> None:
    artifact, folder, model = lowered[name]
    assert host.run_kind(make_target(name).runs_on) == "simulator"
    cosines = centred_cosines(reference(), embed(artifact, folder, make_target(name)))
    assert cosines.mean() > mean and cosines.min() > low
    assert artifact.files[0].path == "rockchip/model_seq_16.rknn"
    shipped = {ref.path: ref.sha256 for ref in artifact.files}
    assert shipped["rockchip/model.onnx"] == model.file.sha256
    assert ("rockchip/feeds.json" in shipped) == (name == "rk3588")


@pytest.mark.rockchip
def test_weight_products_have_8_bits_and_nothing_else_has(lowered: Lowered) -> None:
    artifact, _, model = lowered["rk3588"]
    assert len(model.integer_matmuls) == artifact.placement.integer_matmuls == 12
    assert artifact.placement.float_fallbacks == () and all("/side" in name for name in model.float_matmuls)
    assert {item.operator for item in artifact.placement.host_operators} == {"Cast", "Gather", "Reshape"}
    whole = lowered["rk3588-float16"][0].placement
    assert whole.integer_matmuls == 0 and len(whole.float_by_scheme) == 14


@pytest.mark.rockchip
def test_a_damaged_model_is_not_what_the_files_were_built_from(lowered: Lowered, tmp_path: Path) -> None:
    artifact, folder, _ = lowered["rk3588-float16"]
    shutil.copytree(folder, tmp_path / "bundle")
    path = tmp_path / "bundle" / "rockchip" / "model.onnx"
    proto = onnx.load(path)
    (weight,) = (item for item in proto.graph.initializer if item.name == "layer.1.ffn.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    onnx.save(proto, path)
    with pytest.raises(BundleCorrupt, match="building .* again gives another file"):
        rockchip.load(artifact, tmp_path / "bundle", make_target("rk3588-float16"))


@pytest.mark.rockchip
def test_an_operator_that_the_compiler_lacks_is_named_with_its_log(toolkit: Path, tmp_path: Path) -> None:
    model = make_model("rockchip-float16", tmp_path)
    proto = onnx.load(model.file.path)
    for node in proto.graph.node:
        if node.name == "layer.1.ffn":
            node.op_type, node.domain = "MatMulOfNobody", "nowhere"
    proto.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    onnx.save(proto, tmp_path / "strange.onnx")
    strange = model.model_copy(update={"file": file_ref(tmp_path / "strange.onnx")})
    (tmp_path / "out").mkdir()
    with pytest.raises(LoweringFailed, match="MatMulOfNobody") as error:
        rockchip.lower(strange, make_target("rk3588-float16"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert "MatMulOfNobody" in Path(str(error.value).rsplit("lies in ", 1)[1].rstrip(".")).read_text(encoding="utf-8")


CRASHING = """
import json, os, signal, sys
request = json.loads(sys.stdin.readline())
print(json.dumps({"announce": "compiling seq_16.onnx"}), flush=True)
open(request["log"], "w").write("E build: Conv bias scale of layer.0.ffn is empty\\n")
open(request["output"], "w").write("half")
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_compiler_that_crashes_is_a_message_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CRASHING, encoding="utf-8")
    monkeypatch.setattr(rockchip, "_CHILD", tmp_path / "child.py")
    monkeypatch.setattr(rockchip, "require_interpreter", lambda environment: Path(sys.executable))
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    with pytest.raises(LoweringFailed, match=r"died of SIGSEGV while compiling seq_16\.onnx") as error:
        rockchip.lower(make_model("rockchip-int8", tmp_path), make_target(), tmp_path / "out")
    assert "Conv bias scale of layer.0.ffn is empty" in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def quantised(path: Path) -> None:
    """Write the encoder up to its pooling as ONNX Runtime's own QDQ model, in the operators that the compiler reads."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(encoder.tokens(1, 8))

        def get_next(self) -> dict[str, np.ndarray] | None:
            ids = next(self._rows, None)
            return (
                None if ids is None else {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), int)}
            )

    model = onnx.load(path)
    (pooled,) = (node.output[0] for node in model.graph.node if node.op_type == "MatMul" and "pool" in node.name)
    onnx.utils.extract_model(path, path, ["input_ids", "attention_mask"], [pooled], check_model=False)
    quantize_static(path, path, Reader(), per_channel=True, weight_type=QuantType.QInt8)


@pytest.mark.rockchip
def test_the_compiler_dies_of_a_qdq_model_and_that_is_a_message(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("rockchip-float16", tmp_path)
    quantised(Path(model.file.path))
    for name in ("out", "stand"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "stand")  # dying, the compiler leaves files of its own where it stands
    deadly = model.model_copy(update={"file": file_ref(Path(model.file.path))})
    with pytest.raises(LoweringFailed, match=r"died of SIGSEGV while compiling seq_16\.onnx") as error:
        rockchip.lower(deadly, make_target("rk3588-float16"), tmp_path / "out")
    assert [*(tmp_path / "out").iterdir(), *(tmp_path / "stand").iterdir()] == []
    log = Path(str(error.value).rsplit("lies in ", 1)[1].rstrip("."))
    assert "RKNNSubgraphManager" in log.read_text(encoding="utf-8", errors="replace")


def test_a_missing_toolkit_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path))
    with pytest.raises(ToolMissing, match="edgeq doctor --install rknn-toolkit2"):
        rockchip.tools()


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"runtime": {"platform": "rk1808"}}, 'platform is "rk1808"; known are rk3562'),
        ({"runtime": {"platform": "rk3588", "cores": 3}}, "missing or unknown: cores"),
        ({"buckets_tokens": ()}, "buckets_tokens is []"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, object], detail: str) -> None:
    model = make_model("rockchip-int8", tmp_path)
    assert rockchip.rejections(model, make_target()) == ()
    found = [item.detail for item in rockchip.rejections(model, make_target(**changes))]
    assert len(found) == 1 and found[0].startswith(detail)


def test_a_qdq_model_is_refused(tmp_path: Path) -> None:
    (found,) = rockchip.rejections(make_model("w8a8-gemm", tmp_path), make_target())
    assert found.detail == "scheme w8a8-gemm quantises the model itself"


LOG = """D RKNN: [10:00:00.1] ID   OpType   DataType Target InputShape  OutputShape  Cycles  RW(KB)  FullName
D RKNN: [10:00:00.1] -----------------------------------------------
D RKNN: [10:00:00.1] 0    InputOperator  INT64  CPU  \\  (1,16)  0/0/0  0  InputOperator:input_ids
D RKNN: [10:00:00.1] 1    Gather         INT8   CPU  (9,4),(1,16)  (1,16,4)  0/0/0  5  Gather:lookup
D RKNN: [10:00:00.1] 2    Conv           INT8   NPU  (1,4,1,16)  (1,4,1,16)  1/2/2  5  Conv:ffn#2
D RKNN: [10:00:00.1] -----------------------------------------------
D RKNN: [10:00:00.2] 2    Conv  ffn.weight_branch0  INT8     (4,2,1,1)  | 0x00 0x10 0x10
D RKNN: [10:00:00.2] 2    Conv  ffn.weight_branch1  FLOAT16  (4,2,1,1)  | 0x10 0x30 0x20
E RKNN: [10:00:00.2] Unkown op target: 0
"""


def test_the_listing_tells_place_and_dtype() -> None:
    assert [(item.kind, item.processor, item.name) for item in compiler_log.operators(LOG)] == [
        ("Gather", "CPU", "lookup"), ("Conv", "NPU", "ffn#2"),
    ]  # fmt: skip
    assert compiler_log.weights(LOG) == {"ffn.weight": {"INT8", "FLOAT16"}}
    assert "Unkown" not in compiler_log.complaints(LOG + "\x1b[1;31mE\x1b[0m build: no such SoC")
    assert compiler_log.complaints(LOG + "\x1b[1;31mE\x1b[0m build: no such SoC") == "  build: no such SoC"
