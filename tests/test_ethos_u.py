"""The Ethos-U backend: what Vela leaves to the host, what it expects, and what is done when it refuses or dies."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest
from tiny_bundle import MEASURES

pytest.importorskip("ai_edge_litert", reason="needs the extra `ethos-u`")
pytest.importorskip("ethosu", reason="needs the extra `ethos-u`")

from ai_edge_litert import schema_py_generated as schema

from edgeq import targets
from edgeq.backends import ethos_u, tflite
from edgeq.backends.ethos_u import compiled_file, compiler, crashing_operator, rules
from edgeq.backends.tflite import emitter
from edgeq.backends.tflite.writer import ModelWriter, QuantParams
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import ConfigError, LoweringFailed, TimedOut, ToolMissing
from edgeq.evaluation import gate as gates
from edgeq.evaluation import parity
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import Artifact, HostOperator, QdqModel, Target
from edgeq.system.cache import LOCATION_VARIABLE
from edgeq.system.files import file_ref

pytestmark = pytest.mark.ethos_u

BUCKETS = (16, 48)
TOKENS = Tokens(encoder.tokens(3, 24), 0, 0)
U85 = compiler.Settings("ethos-u85-256", "Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB", 384)
WRITTEN = emitter.Settings(32, "quantize", "none")


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QdqModel:
    calibrated = calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)
    scheme = SCHEMES["w8a8-int-npu"]
    proto, integer, floats = quantize.quantize(calibrated.model, calibrated.statistics, scheme)
    path = tmp_path_factory.mktemp("qdq") / "qdq.onnx"
    onnx.save(proto, path)
    return QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=scheme,
        inputs=("input_ids", "attention_mask"), outputs=("sentence_embedding",), dim=encoder.DIM,
        max_sequence=encoder.LONGEST, integer_matmuls=integer, float_matmuls=floats,
    )  # fmt: skip


def target(name: str, **runtime: object) -> Target:
    found = targets.load_target(name)
    return found.model_copy(update={"buckets_tokens": BUCKETS, "runtime": {**found.runtime, **runtime}})


@pytest.fixture(scope="module")
def artifacts(model: QdqModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Artifact, Path]]:
    made = {}
    for name in ("ethos-u55-256", "ethos-u65-512", "ethos-u85-256", "ethos-u85-1024"):
        folder = tmp_path_factory.mktemp(name)
        made[name] = ethos_u.lower(model, target(name), folder), folder
    return made


def one_operator(builtin: str, source: tuple[str, QuantParams | None], result: tuple[str, QuantParams | None]) -> bytes:
    writer = ModelWriter("one")
    graph = writer.subgraph("only")
    given = graph.tensor("given", (1, 64), *source)
    graph._inputs["given"] = given
    made = graph.tensor("made", (1, 64), *result)
    graph.operator(getattr(schema.BuiltinOperator, builtin), 1, [given], made)
    graph.output("made", made)
    return writer.to_bytes()


# Vela 5.2.0 dies of it (SIGSEGV).
DEADLY = one_operator("QUANTIZE", ("int32", QuantParams.of(0.01)), ("int16", QuantParams.of(0.02)))


def test_every_bucket_has_a_compiled_file_and_the_integer_file_lies_beside_them(
    artifacts: dict[str, tuple[Artifact, Path]],
) -> None:
    for artifact, folder in artifacts.values():
        assert [item.path for item in artifact.files] == [
            "ethos_u/model_seq_48_vela.tflite", "ethos_u/model_seq_16_vela.tflite", "ethos_u/model.tflite",
        ]  # fmt: skip
        assert all((folder / item.path).stat().st_size == item.size_bytes for item in artifact.files)


def test_the_host_keeps_the_lookup_and_the_cast_and_the_largest_npu_nothing(
    artifacts: dict[str, tuple[Artifact, Path]],
) -> None:
    for name, (artifact, _) in artifacts.items():
        for path in (item.path for item in artifact.files[:2]):
            left = [item for item in artifact.placement.host_operators if item.file == path]
            expected = [] if name.startswith("ethos-u85") else ["CAST", "GATHER"]
            assert sorted(item.operator for item in left) == expected
            assert all(item.reason == "Unsupported opType" for item in left)


def test_the_finished_file_names_its_npu_and_holds_every_operator(
    model: QdqModel, artifacts: dict[str, tuple[Artifact, Path]]
) -> None:
    for name, (artifact, folder) in artifacts.items():
        rows = str(target(name).runtime["rows"])
        source = tflite.integer_file(model, name, (48,), emitter.Settings(32, "quantize", "none", rows), "litert")[0]
        inside = compiled_file.read((folder / artifact.files[0].path).read_bytes(), source, name)
        assert inside.accelerator == target(name).runtime["accelerator"]
        count = sum(1 for _ in tflite_operators(source))
        assert sum(inside.on_npu.values()) + len(inside.on_host) == count
        assert sum(artifact.placement.operators.values()) == count


def tflite_operators(data: bytes) -> list[object]:
    from edgeq.backends.tflite import kernels

    return list(kernels.read(data).operators)


def test_the_estimate_says_what_it_assumes(artifacts: dict[str, tuple[Artifact, Path]]) -> None:
    for name, (artifact, _) in artifacts.items():
        long, short = artifact.placement.estimates
        runtime = target(name).runtime
        assert (long.accelerator, long.system_config) == (runtime["accelerator"], runtime["system_config"])
        assert long.clock_hz == (500_000_000 if name.startswith("ethos-u55") else 1_000_000_000)
        assert long.estimated_ms == pytest.approx(1e3 * long.cycles / long.clock_hz, rel=1e-6)
        assert 0 < short.cycles < long.cycles
        assert 0 < long.sram_bytes <= long.arena_bytes
        assert long.moved_bytes > short.moved_bytes > 0
        assert (long.flash_bytes > 0) == name.startswith("ethos-u55")
        assert (long.dram_bytes > 0) != name.startswith("ethos-u55")


def test_a_larger_npu_is_expected_to_be_faster(artifacts: dict[str, tuple[Artifact, Path]]) -> None:
    cycles = {name: artifact.placement.estimates[0].cycles for name, (artifact, _) in artifacts.items()}
    assert cycles["ethos-u85-1024"] < cycles["ethos-u85-256"] < cycles["ethos-u55-256"]


def test_compiling_twice_gives_the_same_bytes(
    model: QdqModel, artifacts: dict[str, tuple[Artifact, Path]], tmp_path: Path
) -> None:
    again = ethos_u.lower(model, target("ethos-u55-256"), tmp_path)
    assert again == artifacts["ethos-u55-256"][0]


@pytest.mark.parametrize("name", ["ethos-u55-256", "ethos-u85-256"])
def test_vectors_are_the_integer_files(model: QdqModel, artifacts: dict[str, tuple[Artifact, Path]], name: str) -> None:
    artifact, folder = artifacts[name]
    run = ethos_u.load(artifact, folder, target(name))
    found = embed_batches(run, batches(TOKENS), len(TOKENS.ids))
    mirror = embed_batches(FloatSession.of(Path(model.file.path), optimize=False), batches(TOKENS), len(TOKENS.ids))
    near = np.sum(found * mirror, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(mirror, axis=1)
    assert near.mean() > 0.997
    assert parity.invariance(run, TOKENS, encoder.LONGEST, BUCKETS) > 0.999


def test_an_operator_on_the_host_too_many_fails_the_gate_by_name() -> None:
    gate = targets.load_target("ethos-u85-256").gate
    good = MEASURES
    gelu = HostOperator(file="a.tflite", operator="GELU", output="layer.0.gelu", reason="int16")
    base = Artifact.model_validate({
        "backend": "ethos_u", "target": "t", "qdq_sha256": "0" * 64, "tools": {},
        "files": ({"path": "a.tflite", "sha256": "0" * 64, "size_bytes": 1},),
        "placement": {"integer_matmuls": 1, "float_by_scheme": (), "float_fallbacks": (), "operators": {}},
    }).placement  # fmt: skip
    assert gates.judge(good, base, gate, "host-kernels") == ()
    (failure,) = gates.judge(good, base.model_copy(update={"host_operators": (gelu,)}), gate, "host-kernels")
    assert failure == "a.tflite: 1 operators run on the host (GELU (layer.0.gelu)); at most 0 may."
    wider = gate.model_copy(update={"host_operators_max": 1})
    assert gates.judge(good, base.model_copy(update={"host_operators": (gelu,)}), wider, "host-kernels") == ()


def test_rules_name_what_is_wrong(model: QdqModel) -> None:
    wide = model.model_copy(update={"scheme": SCHEMES["w8a8-int"]})
    wrong = target("ethos-u55-256", accelerator="ethos-u99", arena_kib=0, rows="guess")
    details = [item.detail for item in ethos_u.rejections(wide, wrong.model_copy(update={"buckets_tokens": ()}))]
    assert "16-bit products, GELU, tables; take w8a8-int-npu" in details[0]
    assert details[1] == "buckets_tokens is []"
    assert "accelerator is 'ethos-u99'; known are ethos-u55-32" in details[2]
    assert "arena_kib is 0; rows is 'guess'" in details[2]
    other = target("ethos-u55-256", system_config="Ethos_U85_SYS_DRAM_Mid")
    assert "which is no Ethos_U55's" in ethos_u.rejections(model, other)[0].detail
    gemm = model.model_copy(update={"scheme": SCHEMES["w8a8-gemm"]})
    assert "leaves tensors in float" in ethos_u.rejections(gemm, target("ethos-u55-256"))[0].detail
    assert ethos_u.rejections(model, target("ethos-u55-256")) == ()


@pytest.mark.parametrize("key", ["system_config", "memory_mode"])
def test_a_configuration_that_vela_does_not_know_is_named(model: QdqModel, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="Ethos_U55_Nowhere not found in Vela config file"):
        ethos_u.lower(model, target("ethos-u55-256", **{key: "Ethos_U55_Nowhere"}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_does_not_fit_into_the_memory_is_refused(model: QdqModel, tmp_path: Path) -> None:
    with pytest.raises(LoweringFailed, match=r"bucket 48: needs \d+ KiB of SRAM; the target has 8"):
        ethos_u.lower(model, target("ethos-u55-256", arena_kib=8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "ethos-u-vela":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(ethos_u, "version", version)
    with pytest.raises(ToolMissing, match=r'ethos-u-vela is not installed; pip install "edgeq\[ethos-u\]"'):
        ethos_u.tools()


def test_a_crash_names_the_operator_and_keeps_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCATION_VARIABLE, str(tmp_path))
    with pytest.raises(
        LoweringFailed, match=r"died of SIG\w+; of QUANTIZE \(made, from int32 to int16\) alone"
    ) as error:
        compiler.compile_file(DEADLY, "a target: bucket 8", U85)
    log = tmp_path / "logs" / "a-target-bucket-8-vela.log"
    assert str(log) in str(error.value)
    assert log.is_file()


def test_a_file_that_vela_refuses_is_a_message_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCATION_VARIABLE, str(tmp_path))
    with pytest.raises(LoweringFailed, match=r"wrote no file. Its log: .*nonsense-vela\.log, which ends:\n.+"):
        compiler.compile_file(b"no model at all", "nonsense", U85)


def test_a_compiler_that_does_not_end_is_a_message(model: QdqModel) -> None:
    with pytest.raises(TimedOut, match="did not end within 0.01 s"):
        compiler.compile_file(DEADLY, "slow", U85, time_limit_s=0.01)


def test_single_operators_are_whole_files(model: QdqModel) -> None:
    source = tflite.integer_file(model, "t", (16,), WRITTEN, "litert")[0]
    described = dict(crashing_operator.singles(source))
    assert len(described) < len(tflite_operators(source))
    fully_connected = next(data for name, data in described.items() if name.startswith("FULLY_CONNECTED"))
    assert len(tflite_operators(fully_connected)) == 1
    deadly = next(name for name in described if name.startswith("MUL"))
    assert crashing_operator.find(source, lambda data: data == described[deadly]) == deadly
    assert crashing_operator.find(source, lambda data: False) is None


def test_a_file_that_was_never_compiled_is_refused(model: QdqModel) -> None:
    source = tflite.integer_file(model, "t", (16,), WRITTEN, "litert")[0]
    with pytest.raises(LoweringFailed, match="holds commands for no NPU at all"):
        compiled_file.read(source, source, "t")


def test_a_file_for_other_inputs_is_refused(model: QdqModel, artifacts: dict[str, tuple[Artifact, Path]]) -> None:
    artifact, folder = artifacts["ethos-u85-256"]
    other = tflite.integer_file(model, "t", (16,), WRITTEN, "litert")[0]
    with pytest.raises(LoweringFailed, match="inputs and output are"):
        compiled_file.read((folder / artifact.files[0].path).read_bytes(), other, "t")


def test_an_estimate_without_a_number_is_refused() -> None:
    with pytest.raises(LoweringFailed, match="no number in its column cycles_total"):
        compiler.number(compiler.Compiled(b"", {"cycles_total": "many"}, {}), "cycles_total")


def test_the_compiler_places_every_operator_as_the_rules_expect(artifacts: dict[str, tuple[Artifact, Path]]) -> None:
    assert all(artifact.placement.surprises == () for artifact, _ in artifacts.values())


def test_a_disagreement_with_the_rules_is_reported(
    model: QdqModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def takes_no_roots(name: str, dtype: str, product: str) -> str | None:
        """A rule that is wrong."""
        return name if name == "RSQRT" else None

    monkeypatch.setattr(rules, "RULES", (rules.has_gelu_in_8_bits, takes_no_roots))
    artifact = ethos_u.lower(model, target("ethos-u55-256"), tmp_path)
    found = [sentence.partition(": ")[2] for sentence in artifact.placement.surprises]
    assert "CAST (attention_mask/narrow) was expected on the NPU; Vela left it" in found
    assert any(item.startswith("RSQRT (") and item.endswith("was expected on the host; Vela took it") for item in found)
