"""The whole export on a tiny BERT: what is written, what is reused, and what is left behind when it goes wrong."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import tiny_source  # noqa: E402

from edgeq import cli  # noqa: E402
from edgeq.backends import openvino  # noqa: E402
from edgeq.bundle.checksums import write_sums  # noqa: E402
from edgeq.bundle.golden import read_golden  # noqa: E402
from edgeq.bundle.load import load  # noqa: E402
from edgeq.bundle.manifest import load_manifest, load_report  # noqa: E402
from edgeq.bundle.verify import verify  # noqa: E402
from edgeq.errors import BundleCorrupt, ConfigError, DeviceUnavailable, StorageFailed  # noqa: E402
from edgeq.pipeline import calibrate, check, export  # noqa: E402
from edgeq.pipeline.request import ExportRequest  # noqa: E402
from edgeq.pipeline.validate import validate  # noqa: E402
from edgeq.quantization import schemes  # noqa: E402
from edgeq.records import Gate, Manifest, ParityReport, Target  # noqa: E402
from edgeq.system import files  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402
from edgeq.system.files import file_ref  # noqa: E402
from edgeq.system.host import run_kind  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

# Random weights hardly separate texts: only that the vectors are near is judged here.
EASY = Gate(
    centred_cosine_mean_min=0.9, centred_cosine_p01_min=0.5, centred_cosine_min_min=0.5, regret_mean_max=0.5,
    regret_p99_max=1.0, spearman_min=0.1, exactness_min=0.9, invariance_min=0.99999,
    norm_error_max=1e-3, norm_error_unnormalized_max=0.5, float_fallbacks_max=0, host_operators_max=0,
    export_run_kinds=("device", "host-kernels"), release_run_kinds=("device",),
)  # fmt: skip
STRICT = EASY.model_copy(update={"centred_cosine_mean_min": 1.0})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.sentence_transformer(tmp_path_factory.mktemp("source") / "model", dense=True)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def request_(model: Path, shared_cache: Cache, tmp_path: Path) -> ExportRequest:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(tiny_source.texts(200)), encoding="utf-8")
    target = load_target("x86-64-avx2-onnxruntime").model_copy(update={"gate": EASY})
    return ExportRequest(model=str(model), targets=(target,), out=tmp_path / "out", cache=shared_cache, texts=texts)


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def float_model(made: export.Exported, cache: Cache) -> Path:
    """Find the FP32 model that a bundle was made from."""
    sha256 = load_manifest(Path(made.path)).float_model.file.sha256
    return next(path for path in cache.root.glob("float-model/*/model.onnx") if files.sha256_file(path) == sha256)


def failing(request: ExportRequest) -> ExportRequest:
    (target,) = request.targets
    return replace(request, targets=(target.model_copy(update={"gate": STRICT}),))


def test_an_export_writes_a_bundle_that_verifies(request_: ExportRequest) -> None:
    (made,) = export.export(request_, silent)
    assert (made.status, made.failures, made.report) == ("passed", (), "")
    assert made.ran_on == run_kind(request_.targets[0].runs_on)
    found = verify(Path(made.path))
    assert found.golden_texts >= 16
    manifest = json.loads((Path(made.path) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["artifact"]["placement"]["integer_matmuls"] == 12
    assert str(request_.out.parent) not in json.dumps(manifest)  # no machine path
    assert (Path(made.path) / "2_Dense" / "model.safetensors").is_file()


def test_a_missed_gate_is_met_by_promoting(request_: ExportRequest, tmp_path: Path) -> None:
    (plain,) = export.export(request_, silent)
    assert plain.parity is not None and plain.promotion is None
    limit = 1.0 - 0.95 * (1.0 - plain.parity.centred_cosine_mean_low)
    target = request_.targets[0].model_copy(update={"gate": EASY.model_copy(update={"centred_cosine_mean_min": limit})})
    wanted = replace(request_, targets=(target,), out=tmp_path / "promoted")
    (refused,) = export.export(replace(wanted, promote=False), silent)
    assert (refused.status, refused.path, refused.promotion) == ("failed", "", None)
    (made,) = export.export(wanted, silent)
    assert (made.status, made.failures) == ("passed", ())
    assert made.promotion is not None and made.parity is not None
    assert 0 < len(made.promotion.products) < made.promotion.of_products == 12
    assert made.promotion.missed_before == refused.failures
    assert made.parity.centred_cosine_mean_low >= limit
    bundle = Path(made.path)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["qdq_model"]["scheme"]["promoted"] == list(made.promotion.products)
    assert made.promotion.sentence[1:] in (bundle / "README.md").read_text(encoding="utf-8")
    assert verify(bundle).status == "passed"
    again = export.export(wanted, silent)
    assert again == (made,)


@pytest.mark.parametrize("share", [0.15, 1e-4])
def test_a_gate_that_promoting_misses_is_met_by_float_products(
    request_: ExportRequest, tmp_path: Path, share: float
) -> None:
    (plain,) = export.export(request_, silent)
    assert plain.parity is not None
    limit = 1.0 - share * (1.0 - plain.parity.centred_cosine_mean_low)
    target = request_.targets[0].model_copy(update={"gate": EASY.model_copy(update={"centred_cosine_mean_min": limit})})
    wanted = replace(request_, targets=(target,), out=tmp_path / "floats")
    (made,) = export.export(wanted, silent)
    assert (made.status, made.failures) == ("passed", ())
    assert made.promotion is not None and made.promotion.floats
    bundle = Path(made.path)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["qdq_model"]["scheme"]["floats"] == list(made.promotion.floats)
    assert set(made.promotion.floats) <= set(manifest["artifact"]["placement"]["float_by_scheme"])
    assert made.promotion.extra_bytes > 0 and made.promotion.has_float_tables == (share < 0.1)
    assert made.promotion.sentence[1:] in (bundle / "README.md").read_text(encoding="utf-8")
    assert verify(bundle).status == "passed"


def test_a_scheme_with_promoted_products_makes_a_bundle_that_verifies(request_: ExportRequest, tmp_path: Path) -> None:
    (plain,) = export.export(request_, silent)
    own = schemes.find(request_.targets[0].scheme, "")
    manifest = json.loads((Path(plain.path) / "manifest.json").read_text(encoding="utf-8"))
    promoted, path = manifest["qdq_model"]["integer_matmuls"][0], tmp_path / "scheme.json"
    path.write_text(schemes.promote(own, [promoted]).model_dump_json(), encoding="utf-8")
    wanted = replace(request_, scheme=path, out=tmp_path / "promoted")
    (made,) = export.export(wanted, silent)
    manifest = json.loads((Path(made.path) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["qdq_model"]["scheme"]["name"] == f"{own.name}+1"
    placement = manifest["artifact"]["placement"]
    assert promoted not in placement["float_by_scheme"]
    assert placement["integer_matmuls"] == 13  # the second product of the promoted one runs in integers, too
    assert verify(Path(made.path)).status == "passed"
    path.write_text(schemes.promote(own, ["no.such.product"]).model_dump_json(), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"promotes no\.such\.product, which this model does not have"):
        export.export(wanted, silent)
    path.write_text(schemes.promote(schemes.find("w8a8-int", ""), []).model_dump_json(), encoding="utf-8")
    with pytest.raises(ConfigError, match="is a form of w8a8-int"):
        export.export(wanted, silent)


@pytest.mark.tflite
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
def test_an_integer_only_bundle_holds_dense_and_pooling(request_: ExportRequest, tmp_path: Path, pooling: str) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    target = load_target("integer-only-w8a16")
    gate = target.gate.model_copy(update={"centred_cosine_mean_min": 0.9985, "centred_cosine_min_min": 0.992})
    target = target.model_copy(update={"gate": gate, "buckets_tokens": (16, 64, 512)})
    # sqrt(n) is part of vectors that keep their length: unit vectors would not show it.
    model = tiny_source.sentence_transformer(
        tmp_path / "model", pooling=pooling, dense=pooling == "mean", normalize=pooling != "mean_sqrt_len_tokens"
    )
    (made,) = export.export(replace(request_, model=str(model), targets=(target,)), silent)
    assert made.failures == (), made.failures
    assert verify(Path(made.path)).max_abs_error == 0.0
    embedder = load(made.path)
    assert embedder.max_sequence == 64  # the largest bucket is cut to what the model takes
    short, long = embedder.encode(["the red tree by the river", " ".join(tiny_source.WORDS)])
    alone = embedder.encode(["the red tree by the river"])[0]
    assert (short == alone).all()
    assert (short != long).any()


@pytest.mark.ethos_u
@pytest.mark.parametrize("name", ["ethos-u55-256", "ethos-u85-256"])
@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "cls", "lasttoken"])
def test_an_ethos_u_bundle_holds_dense_and_pooling(
    request_: ExportRequest, tmp_path: Path, pooling: str, name: str
) -> None:
    pytest.importorskip("ethosu", reason="needs the extra `ethos-u`")
    target = load_target(name)
    # First tokens of random weights point one way: less their mean, little is left of the vectors.
    means = (0.985, 0.96, 0.95) if pooling == "cls" else (0.9985, 0.994, 0.99)
    names = ("centred_cosine_mean_min", "centred_cosine_p01_min", "centred_cosine_min_min")
    own = {**dict(zip(names, means, strict=True)), "host_operators_max": 3}
    gate = target.gate.model_copy(update={**own, "regret_mean_max": 0.1})  # random weights hardly separate 45 texts
    target = target.model_copy(update={"gate": gate, "buckets_tokens": (64,)})
    model = tiny_source.sentence_transformer(
        tmp_path / "model", pooling=pooling, dense=pooling == "mean", normalize=pooling != "mean_sqrt_len_tokens"
    )
    (made,) = export.export(replace(request_, model=str(model), targets=(target,)), silent)
    assert made.failures == (), made.failures
    assert made.ran_on == "host-kernels"
    manifest = json.loads((Path(made.path) / "manifest.json").read_text(encoding="utf-8"))
    placement = manifest["artifact"]["placement"]
    assert placement["surprises"] == []
    left = [item["output"] for item in placement["host_operators"]]
    if name == "ethos-u85-256":
        assert left == []
    else:  # the lookup of the tokens, the cast of the mask; what has no share of one form looks it up
        assert len(left) == (2 if pooling in ("mean", "cls", "mean_sqrt_len_tokens") else 3)
    verify(Path(made.path))
    assert "not a latency" in (Path(made.path) / "README.md").read_text(encoding="utf-8")


@pytest.mark.qnn
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_an_htp_bundle_holds_dense_and_pooling_and_says_how_many_texts_ran(
    request_: ExportRequest, tmp_path: Path, pooling: str
) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")
    target = load_target("snapdragon-8-gen-3")
    gate = target.gate.model_copy(
        update={"centred_cosine_mean_min": 0.998, "regret_mean_max": 0.5, "regret_p99_max": 1.0, "spearman_min": 0.9}
    )
    target = target.model_copy(update={"gate": gate, "buckets_tokens": (16, 512)})
    model = tiny_source.sentence_transformer(tmp_path / "model", pooling=pooling, dense=pooling == "mean")
    (made,) = export.export(replace(request_, model=str(model), targets=(target,)), silent)
    assert (made.status, made.failures, made.ran_on) == ("passed", (), "emulator")
    report = json.loads((Path(made.path) / "parity.json").read_text(encoding="utf-8"))
    assert report["texts"]["count"] == report["measures"]["texts"] == 256
    assert (report["measured"], report["exactness"]["texts"]) == ("qdq-model", gate.parity_texts)
    assert report["exactness"]["centred_cosine_min"] >= gate.exactness_min
    assert verify(Path(made.path)).max_abs_error == 0.0
    (checked,) = check.check(str(float_model(made, request_.cache)), (target,), None, request_.cache)
    assert checked.problems == () and {item.verdict for item in checked.operators} <= {"supported", "unknown"}
    embedder = load(made.path)
    assert embedder.max_sequence == 64
    card = (Path(made.path) / "README.md").read_text(encoding="utf-8")
    assert "QAIRT's number\n57 (HTP v75)" in card and "onnxruntime_qnn" in card


def openvino_target(name: str, **gate: object) -> Target:
    target = load_target(name)
    easy = EASY.model_copy(update={"export_run_kinds": target.gate.export_run_kinds, "invariance_min": 0.999, **gate})
    return target.model_copy(update={"gate": easy})


def run_the_cards_example(path: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> dict[str, object]:
    card = (path / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in card.split("```python\n") if "import openvino as ov" in block]
    code = code.split("```")[0]
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(path)
    names: dict[str, object] = {}
    exec(code, names)
    return names


@pytest.mark.openvino
def test_an_openvino_bundle_is_measured_in_both_precisions_and_opens_without_edgeq(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    wanted = replace(request_, targets=(openvino_target("intel-openvino-cpu"),))
    (made,) = export.export(wanted, silent)
    assert made.failures == (), made.failures
    assert verify(Path(made.path)).max_abs_error == 0.0
    told = json.loads((Path(made.path) / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert told["model_args"] == {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    (setting,) = load_report(Path(made.path)).other_settings
    assert made.other_settings == (setting,)
    assert setting.name == "inference_precision_hint=bf16"
    assert (setting.measures is None) == (setting.reason is not None)
    anew = validate(Path(made.path), None, None, float_model(made, request_.cache), silent)
    assert [item.name for item in anew.other_settings] == [setting.name]
    assert (anew.other_settings[0].measures is None) == (setting.measures is None)
    names = run_the_cards_example(Path(made.path), monkeypatch)
    vectors = load(made.path).encode(names["texts"])  # type: ignore[arg-type]
    np.testing.assert_allclose(names["vectors"], vectors, atol=1e-5)  # type: ignore[arg-type]
    (again,) = export.export(replace(wanted, out=request_.out.parent / "other"), silent)
    for name in ("openvino/openvino_model.xml", "openvino/openvino_model.bin", "manifest.json", "parity.json"):
        assert (Path(made.path) / name).read_bytes() == (Path(again.path) / name).read_bytes()


@pytest.mark.openvino
def test_without_an_npu_the_bundle_is_written_and_says_that_it_was_never_run(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    target = openvino_target("intel-openvino-npu")
    if openvino.obstacle(target) is None:
        pytest.skip("an NPU is here")
    caplog.set_level("WARNING", logger="edgeq")  # a test of --quiet may have left it higher
    (made,) = export.export(replace(request_, targets=(target,)), silent)
    assert (made.status, made.ran_on, made.parity, made.failures) == ("not-run", "not-run", None, ())
    assert "was not run" in caplog.text
    report = load_report(Path(made.path))
    assert "finds no NPU" in str(report.reason) and "not-run" not in report.gate.release_run_kinds
    (setting,) = report.other_settings
    assert setting.ran_on == "host-kernels" and setting.measures is not None
    found = verify(Path(made.path))
    assert (found.status, found.ran_on, found.max_abs_error) == ("not-run", "not-run", None)
    assert read_golden(Path(made.path)).embeddings is None
    assert "was never run" in (Path(made.path) / "README.md").read_text(encoding="utf-8")
    assert cli.run(["verify", made.path]) == 0
    assert "not run" in capsys.readouterr().out
    anew = validate(Path(made.path), None, None, float_model(made, request_.cache), silent)
    assert (anew.status, anew.ran_on) == ("not-run", "not-run") and anew.other_settings[0].measures is not None
    assert cli.run(["embed", made.path, "--out", str(request_.out / "v.npy"), "--texts", str(request_.texts)]) == 9
    exact = ("settings = {", 'settings = {"INFERENCE_PRECISION_HINT": "f32",')
    names = run_the_cards_example(Path(made.path), monkeypatch, ('"NPU"', '"CPU"'), exact)
    assert np.isfinite(names["vector"]).all()  # type: ignore[call-overload]


@pytest.mark.openvino
def test_what_was_never_run_cannot_pass_nor_hide_a_failure(request_: ExportRequest) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    target = openvino_target("intel-openvino-npu")
    if openvino.obstacle(target) is None:
        pytest.skip("an NPU is here")
    elsewhere = openvino_target("intel-openvino-npu", export_run_kinds=("device",))
    with pytest.raises(DeviceUnavailable, match="its gate asks for a run on device"):
        export.export(replace(request_, targets=(elsewhere,)), silent)
    strict = openvino_target("intel-openvino-npu", centred_cosine_mean_min=1.0)
    (missed,) = export.export(replace(request_, targets=(strict,)), silent)
    assert missed.status == "failed" and "CPU plugin" in missed.failures[0]
    (made,) = export.export(replace(request_, targets=(target,)), silent)
    path = Path(made.path)
    report, manifest = load_report(path), load_manifest(path)
    for changes in ({"status": "passed"}, {"reason": None}, {"ran_on": "device"}):
        forge(path, report.model_copy(update=changes), manifest)
        with pytest.raises(BundleCorrupt):
            verify(path)
    forge(path, report, manifest)
    assert verify(path).status == "not-run"


def forge(path: Path, report: ParityReport, manifest: Manifest) -> None:
    """Write a report into a bundle so that every sum and reference holds."""
    (path / "parity.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    parity = file_ref(path / "parity.json", path)
    changed = manifest.model_copy(update={"status": report.status, "parity": parity})
    (path / "manifest.json").write_text(changed.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_sums(path)


def test_a_second_export_reuses_everything_and_gives_the_same_bytes(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = export.export(request_, silent)

    def again(*_: object) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(calibrate, "calibrate", again)
    (second,) = export.export(replace(request_, out=request_.out.parent / "other"), silent)
    names = sorted(path.relative_to(first.path) for path in Path(first.path).rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second.path) for path in Path(second.path).rglob("*") if path.is_file())
    assert all((Path(first.path) / name).read_bytes() == (Path(second.path) / name).read_bytes() for name in names)


def test_a_failed_gate_keeps_the_report_and_no_bundle(request_: ExportRequest) -> None:
    (made,) = export.export(failing(request_), silent)
    assert made.status == "failed" and made.path == ""
    assert "centred cosine mean" in made.failures[0]
    assert [path.name for path in request_.out.iterdir()] == ["x86-64-avx2-onnxruntime.parity.json"]
    assert json.loads(Path(made.report).read_text(encoding="utf-8"))["status"] == "failed"
    (passed,) = export.export(request_, silent)
    assert passed.status == "passed" and not Path(made.report).exists()


def test_a_failed_bundle_is_written_when_asked_for_and_says_so(request_: ExportRequest) -> None:
    (made,) = export.export(replace(failing(request_), keep_failed=True), silent)
    assert made.status == "failed"
    assert "FAILED" in (Path(made.path) / "README.md").read_text(encoding="utf-8")


def test_a_dry_run_converts_nothing(request_: ExportRequest) -> None:
    (made,) = export.export(replace(request_, dry_run=True), silent)
    assert made.status == "not-run" and made.parity is None
    assert not request_.out.exists()


def test_texts_that_are_evaluated_on_are_refused(request_: ExportRequest, tmp_path: Path) -> None:
    assert request_.texts is not None
    line = request_.texts.read_text(encoding="utf-8").splitlines()
    # A calibration text, in other spacing and case.
    from edgeq.data.splits import sha256_text, split

    kept, _ = split(line, sha256_text)
    (tmp_path / "evaluation.txt").write_text(f"something else entirely\n  {kept[0].upper()} \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="text 2"):
        export.export(replace(request_, evaluation=(tmp_path / "evaluation.txt",)), silent)


def test_too_few_validation_texts_are_refused(request_: ExportRequest, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n".join(tiny_source.texts(3, seed=9)), encoding="utf-8")
    with pytest.raises(ConfigError, match="validation texts are left; 16 are needed"):
        export.export(replace(request_, validation=few), silent)


def test_an_interrupt_leaves_neither_bundle_nor_damaged_cache(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(request_, cache=Cache(tmp_path / "cache"))

    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export(fresh, interrupted)
    assert not fresh.out.exists()
    assert {entry.kind for entry in fresh.cache.entries()} == {"float-model"}
    leftovers = [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith((".partial", ".replaced"))]
    assert leftovers == []
    (made,) = export.export(fresh, silent)
    assert made.status == "passed"


def test_a_full_disk_is_one_message(request_: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    export.export(replace(request_, out=request_.out.parent / "before"), silent)  # fills the cache
    original = files.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name == "model.onnx":
            with files.storage_errors(f"writing {path}"):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr("edgeq.backends.onnxruntime.write_bytes", full)
    with pytest.raises(StorageFailed, match="the disk is full"):
        export.export(request_, silent)
    assert not list(request_.out.glob("*")) if request_.out.exists() else True


def test_an_output_folder_with_something_else_is_left_alone(request_: ExportRequest) -> None:
    place_ = request_.out / request_.targets[0].name
    place_.mkdir(parents=True)
    (place_ / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no edgeq bundle"):
        export.export(replace(request_, overwrite=True), silent)
    assert (place_ / "thesis.tex").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "x86-64-onnxruntim"], 2, "x86-64-onnxruntime"),
        (["--target", "x86-64-onnxruntime", "--texts", "missing.txt"], 2, "no such file"),
        (["--target", "x86-64-onnxruntime", "--pooling", "average"], 2, "unknown mode"),
        (["--target", "x86-64-onnxruntime", "--dim", "0"], 2, "--dim is 0; at least 1 is needed"),
    ],
)
def test_a_wrong_argument_is_one_message_before_any_work(
    model: Path, arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export", str(model), "--out", str(tmp_path / "out"), *arguments, "-q"]) == code
    found = capsys.readouterr()
    assert message in found.err and "Traceback" not in found.err
    assert not (tmp_path / "out").exists()
