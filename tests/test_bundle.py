from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tiny_bundle import (
    DIM,
    MEASURES,
    TEXTS,
    TinyBackend,
    make_bundle,
    make_config,
    make_golden,
    make_lineage,
    make_model,
    make_report,
    make_target,
)

from edgeq.backends.registry import BACKENDS
from edgeq.bundle.checksums import write_sums
from edgeq.bundle.client_files import state_limit
from edgeq.bundle.golden import GoldenData, read_golden, write_golden
from edgeq.bundle.load import load
from edgeq.bundle.manifest import load_manifest, load_report
from edgeq.bundle.verify import judge_golden, verify
from edgeq.bundle.write import write
from edgeq.data.tokens import token_limit
from edgeq.errors import BundleCorrupt, ConfigError, EdgeqError, ParityFailed, Unsupported
from edgeq.records import Manifest, RunsOn, SettingReport

FILES = {
    "1_Pooling/config.json",
    "README.md",
    "SHA256SUMS",
    "golden.jsonl",
    "golden.npz",
    "manifest.json",
    "modules.json",
    "onnx/model.onnx",
    "parity.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "validate.py",
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyBackend:
    backend = TinyBackend()
    monkeypatch.setitem(BACKENDS, "tiny", backend)  # type: ignore[arg-type]
    return backend


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_bundle_holds_what_it_must_and_verifies(tmp_path: Path) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    assert set(contents(path)) == FILES
    found = verify(path)
    assert (found.files, found.golden_texts, found.status, found.ran_on) == (12, 32, "passed", "device")
    assert found.cosine_min > 0.999999
    assert found.max_abs_error < 1e-6
    assert 0.99 < found.float32_cosine_min < 0.99999
    assert load_manifest(path) == manifest
    assert load_report(path) == make_report(make_target())


@pytest.mark.parametrize("buckets", [(), (4, 6), (64,)])
def test_every_file_states_the_limit_that_was_validated(tmp_path: Path, buckets: tuple[int, ...]) -> None:
    target = make_target().model_copy(update={"buckets_tokens": buckets})
    path, manifest = make_bundle(tmp_path / "out", target=target)
    limit = token_limit(buckets, manifest.source.max_sequence)
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["truncation"]["max_length"] == limit and tokenizer["padding"]["strategy"] == "BatchLongest"
    assert config == {"model_max_length": limit, "max_length": limit, "truncation_side": "right"}
    module = json.loads((path / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert module["max_seq_length"] == limit
    as_found = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))  # by a library that knows no other file
    assert len(as_found.encode(" ".join(TEXTS) * 9).ids) == limit


def test_what_a_model_without_a_mask_pads_to_is_kept(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 8}, "pad_id": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"truncation": None, "padding": padding}), encoding="utf-8")
    pads = {"padding": "max_length", "max_length": 8, "model_max_length": 64}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(pads), encoding="utf-8")
    state_limit(tmp_path, 8)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["padding"] == padding
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) == pads | {
        "model_max_length": 8
    }


def test_sha256sum_accepts_the_sums(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(FILES) - 1


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = make_bundle(tmp_path / "a" / "out")
    monkeypatch.setattr("time.time", lambda: 2e9)
    second, _ = make_bundle(tmp_path / "b" / "out")
    assert contents(first) == contents(second)


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    assert manifest.float_model.file.path == "float.onnx"
    for name, data in contents(path).items():
        assert b"/somewhere" not in data, name
        assert str(tmp_path).encode() not in data, name


def test_a_flipped_byte_is_found_and_named_in_every_file(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    for name, data in contents(path).items():
        for position in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            for flip in (0x01, 0x20, 0x80):
                damaged = bytearray(data)
                damaged[position] ^= flip
                (path / name).write_bytes(damaged)
                with pytest.raises(BundleCorrupt) as caught:
                    verify(path)
                assert name in str(caught.value), (name, position, flip)
        (path / name).write_bytes(data)
    assert verify(path).files == len(FILES) - 1


def test_every_byte_of_the_sums_counts(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    data = (path / "SHA256SUMS").read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x04
        (path / "SHA256SUMS").write_bytes(damaged)
        with pytest.raises(BundleCorrupt, match="SHA256SUMS"):
            verify(path)


def test_a_damaged_sum_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    sums = (path / "SHA256SUMS").read_bytes()
    digit = sums[5:6]
    (path / "SHA256SUMS").write_bytes(sums[:5] + (b"0" if digit != b"0" else b"1") + sums[6:])
    with pytest.raises(BundleCorrupt, match="SHA256SUMS: the sum of 1_Pooling/config.json is damaged in 1 digits"):
        verify(path)


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (path / name).unlink()
    with pytest.raises((BundleCorrupt, ConfigError), match=name):
        verify(path)


def test_an_extra_file_is_named(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (path / "onnx" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleCorrupt, match="onnx/notes.txt: is there but not listed"):
        verify(path)


def rewrite(path: Path, edit) -> None:  # type: ignore[no-untyped-def]
    """Change the manifest and make the sums agree: only the chain can tell."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    write_sums(path)


OTHER = "f" * 64


@pytest.mark.parametrize(
    ("record", "key", "value"),
    [
        ("source", "sha256", OTHER),
        ("float_model", "source_sha256", OTHER),
        ("equalized_model", "source_sha256", OTHER),
        ("calibration", "float_model_sha256", OTHER),
        ("qdq_model", "float_model_sha256", OTHER),
        ("qdq_model", "calibration_sha256", OTHER),
        ("artifact", "qdq_sha256", OTHER),
        ("artifact", "target", "another"),
        ("artifact", "backend", "another"),
        ("target", "scheme", "another"),
        ("source", "dim", DIM + 1),
        ("parity", "sha256", OTHER),
    ],
)
def test_every_link_of_the_chain_is_walked(tmp_path: Path, record: str, key: str, value: object) -> None:
    path, _ = make_bundle(tmp_path / "out")
    rewrite(path, lambda manifest: manifest[record].update({key: value}))
    with pytest.raises(BundleCorrupt, match="the chain is broken"):
        verify(path)


LIMITS = ("source", "float_model", "equalized_model", "qdq_model")


@pytest.mark.parametrize(("record", "other"), [("source", "float_model"), *((name, "source") for name in LIMITS[1:])])
def test_records_of_two_limits_are_refused_where_they_are_read(tmp_path: Path, record: str, other: str) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    said = f"{other if record == 'source' else record}.max_sequence is .*, but source.max_sequence is"
    rewrite(path, lambda content: content[record].update({"max_sequence": manifest.source.max_sequence // 2}))
    for opened in (verify, load, load_manifest):
        with pytest.raises(BundleCorrupt, match=said):
            opened(path)


@pytest.mark.parametrize("record", ["float_model", "equalized_model", "qdq_model"])
@pytest.mark.parametrize(("key", "value"), [("max_sequence", 4), ("dim", DIM + 1), ("inputs", ("input_ids",))])
def test_records_that_disagree_are_never_written(tmp_path: Path, record: str, key: str, value: object) -> None:
    make_model(tmp_path / "artifact" / "onnx" / "model.onnx")
    make_config(tmp_path / "config")
    lineage = make_lineage(tmp_path / "artifact", make_target())
    changed = replace(lineage, **{record: getattr(lineage, record).model_copy(update={key: value})})
    golden = make_golden(tmp_path / "artifact", tmp_path / "config")
    with pytest.raises(BundleCorrupt, match=f"{record}.{key} is .*, but source.{key} is"):
        write(tmp_path / "out", changed, tmp_path / "artifact", tmp_path / "config", golden, make_report(make_target()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "says_limit"),
    [
        ("sentence_bert_config.json", lambda limit: {"max_seq_length": limit}, "max_seq_length is 2"),
        ("tokenizer_config.json", lambda limit: {"model_max_length": limit}, "model_max_length is 2"),
        ("tokenizer_config.json", lambda limit: {"max_length": limit}, "max_length is 2"),
        ("tokenizer.json", lambda limit: {"truncation": {"max_length": limit}}, "truncation.max_length is 2"),
    ],
)
def test_a_file_that_states_another_limit_is_refused(
    tmp_path: Path, name: str, content: Callable[[int], dict[str, object]], says_limit: str
) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    held = json.loads((path / name).read_text(encoding="utf-8")) if (path / name).is_file() else {}
    for limit in (manifest.source.max_sequence, 2):
        stated = {key: (held.get(key) or {}) | value if isinstance(value, dict) else value
                  for key, value in content(limit).items()}  # fmt: skip
        (path / name).write_text(json.dumps(held | stated), encoding="utf-8")
        write_sums(path)
        if limit != 2:
            verify(path)
            continue
        with pytest.raises(BundleCorrupt, match=f"{name}: {says_limit}, but source.max_sequence"):
            verify(path)
        if name != "tokenizer.json":  # large, and cutting texts does not ask it
            with pytest.raises(BundleCorrupt, match=says_limit):
                load(path)


def test_more_calibration_tokens_than_the_limit_allows_are_refused(tmp_path: Path) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    most = manifest.calibration.texts.count * manifest.source.max_sequence
    rewrite(path, lambda content: content["calibration"]["texts"].update({"tokens": most}))
    verify(path)
    rewrite(path, lambda content: content["calibration"]["texts"].update({"tokens": most + 1}))
    with pytest.raises(BundleCorrupt, match=f"calibration.texts has {most + 1} tokens"):
        verify(path)


def test_a_record_may_not_name_a_file_outside(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    shutil.copy(path / "parity.json", path.parent / "parity.json")
    rewrite(path, lambda manifest: manifest["parity"].update({"path": "../parity.json"}))
    with pytest.raises(BundleCorrupt, match=r"\.\./parity\.json is not in the bundle"):
        verify(path)


@pytest.mark.parametrize("part", ["equalized_model", "calibration", "qdq_model"])
def test_a_replaced_parent_breaks_the_chain(tmp_path: Path, part: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    rewrite(path, lambda manifest: manifest[part]["file"].update({"sha256": OTHER}))
    with pytest.raises(BundleCorrupt, match=part):
        verify(path)


def test_replaced_golden_and_artifact_files_break_the_chain(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    golden = read_golden(path)
    write_golden(path, GoldenData(**{**vars(golden), "embeddings": golden.reference}))
    make_model(path / "onnx" / "model.onnx", seed=4)
    write_sums(path)
    with pytest.raises(BundleCorrupt) as caught:
        verify(path)
    assert "golden.npz is not the file" in str(caught.value)
    assert "onnx/model.onnx is not the file" in str(caught.value)


def test_a_report_that_passed_against_its_own_measures_is_found(tmp_path: Path) -> None:
    target = make_target()
    poor = make_report(target, measures=MEASURES.model_copy(update={"centred_cosine_min": 0.5}))
    path, _ = make_bundle(tmp_path / "out", report=poor)
    with pytest.raises(BundleCorrupt, match="parity.json says passed, but its measures say: centred cosine min is 0.5"):
        verify(path)
    path, _ = make_bundle(tmp_path / "none", report=make_report(target, measures=None))
    with pytest.raises(BundleCorrupt, match="passed without measures"):
        verify(path)


def test_another_tokenizer_is_found_by_the_golden_ids(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["password"], words["invoice"] = words["invoice"], words["password"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    write_sums(path)
    with pytest.raises(BundleCorrupt, match=r"golden.npz: text \d+ has the token ids"):
        verify(path)


def test_a_runtime_that_gives_other_vectors_is_found(tmp_path: Path, tiny: TinyBackend) -> None:
    path, _ = make_bundle(tmp_path / "out")
    tiny.scale = 1.1
    with pytest.raises(ParityFailed, match="every file is whole"):
        verify(path)
    tiny.scale = float("nan")
    with pytest.raises(ParityFailed, match="finite: False"):
        verify(path)


@pytest.mark.parametrize("changes", [{"max_abs_error": 1.1e-3}, {"cosine_min": 0.99989}])
def test_on_the_same_machine_error_and_cosine_both_count(tmp_path: Path, changes: dict[str, float]) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    found = verify(path)
    judge_golden(path, manifest, found, is_same_machine=True)
    with pytest.raises(ParityFailed):
        judge_golden(path, manifest, found.model_copy(update=changes), is_same_machine=True)
    judge_golden(path, manifest, found.model_copy(update=changes), is_same_machine=False)


def test_elsewhere_the_vectors_need_only_be_as_exact_as_the_gate_asks(tmp_path: Path, tiny: TinyBackend) -> None:
    target = make_target()
    report = make_report(target, ran_on="host-kernels")
    path, _ = make_bundle(tmp_path / "out", report=report)
    tiny.scale = 1.02
    found = verify(path)
    assert found.max_abs_error > 1e-3
    assert found.ran_on == "device"
    tiny.scale = 2.0
    with pytest.raises(ParityFailed, match=r"at least 0\.99 with the recorded ones is needed"):
        verify(path)


def test_a_cpu_without_the_flags_is_refused(tmp_path: Path) -> None:
    here = make_target().runs_on.machine
    target = make_target(runs_on=RunsOn(machine=here, cpu_flags_all=("no_such_flag",), cpu_flags_any=()))
    path, _ = make_bundle(tmp_path / "out", target=target)
    with pytest.raises(Unsupported, match="no_such_flag"):
        verify(path)


def test_a_failed_bundle_says_so_everywhere(tmp_path: Path) -> None:
    target = make_target()
    sentence = "centred cosine min is 0.500000; at least 0.993 is needed."
    report = make_report(
        target,
        status="failed",
        measures=MEASURES.model_copy(update={"centred_cosine_min": 0.5}),
        failures=(sentence,),
    )
    path, manifest = make_bundle(tmp_path / "out", report=report)
    assert manifest.status == "failed"
    assert f"> - {sentence}" in (path / "README.md").read_text(encoding="utf-8")
    assert verify(path).status == "failed"


def test_the_same_bundle_is_checked_and_kept(tmp_path: Path) -> None:
    path, first = make_bundle(tmp_path / "out")
    _, again = make_bundle(tmp_path / "out")
    assert again == first
    (path / "modules.json").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(BundleCorrupt, match="modules.json"):
        make_bundle(tmp_path / "out")
    make_bundle(tmp_path / "out", overwrite=True)
    assert verify(path).status == "passed"


def test_another_bundle_needs_overwrite(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    before = contents(path)
    with pytest.raises(ConfigError, match="--overwrite"):
        make_bundle(tmp_path / "out", seed=1)
    assert contents(path) == before
    make_bundle(tmp_path / "out", seed=1, overwrite=True)
    assert contents(path)["onnx/model.onnx"] != before["onnx/model.onnx"]
    assert verify(path).status == "passed"
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["tiny-target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    place = tmp_path / "out" / "tiny-target"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no edgeq bundle"):
        make_bundle(tmp_path / "out", overwrite=overwrite)
    assert contents(place) == {"thesis.txt": b"years of work"}
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out" / "tiny-target").mkdir(parents=True)
    path, _ = make_bundle(tmp_path / "out")
    assert verify(path).status == "passed"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    artifact_dir, config_dir = tmp_path / "artifact", tmp_path / "config"
    make_model(artifact_dir / "onnx" / "model.onnx")
    make_config(config_dir)
    target = make_target()
    lineage, golden = make_lineage(artifact_dir, target), make_golden(artifact_dir, config_dir)
    make_model(artifact_dir / "onnx" / "model.onnx", seed=1)  # not the file that the record names
    with pytest.raises(EdgeqError, match="is not the file its record names"):
        write(tmp_path / "out" / "t", lineage, artifact_dir, config_dir, golden, make_report(target))
    assert list((tmp_path / "out").iterdir()) == []


def test_config_without_a_tokenizer_or_over_our_own_files_is_refused(tmp_path: Path) -> None:
    artifact_dir, config_dir = tmp_path / "artifact", tmp_path / "config"
    make_model(artifact_dir / "onnx" / "model.onnx")
    make_config(config_dir)
    target = make_target()
    parts = make_lineage(artifact_dir, target), artifact_dir, config_dir, make_golden(artifact_dir, config_dir)
    (config_dir / "onnx").mkdir()
    (config_dir / "onnx" / "model.onnx").write_bytes(b"x")
    with pytest.raises(EdgeqError, match="is in the bundle already"):
        write(tmp_path / "out" / "t", *parts, make_report(target))
    (config_dir / "tokenizer.json").unlink()
    with pytest.raises(EdgeqError, match="tokenizer.json is not there"):
        write(tmp_path / "out" / "t", *parts, make_report(target))


def test_what_is_no_bundle_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_manifest(tmp_path / "none")
    with pytest.raises(ConfigError, match="is no bundle"):
        verify(tmp_path)
    path, _ = make_bundle(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds the bundles tiny-target"):
        load_manifest(path.parent)
    with pytest.raises(ConfigError, match="is no bundle"):
        load_manifest(path / "README.md")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda manifest: manifest.update({"format": 2}), "format"),
        (lambda manifest: manifest.update({"extra": 1}), "extra"),
        (lambda manifest: manifest.pop("artifact"), "artifact"),
        (lambda manifest: manifest["source"].update({"dim": "many"}), "source.dim"),
    ],
)
def test_a_manifest_that_is_not_ours_names_file_and_key(tmp_path: Path, edit, said: str) -> None:  # type: ignore[no-untyped-def]
    path, _ = make_bundle(tmp_path / "out")
    rewrite(path, edit)
    with pytest.raises(BundleCorrupt) as caught:
        load_manifest(path)
    assert f"manifest.json: {said}: " in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_manifest_that_is_no_json_is_named(tmp_path: Path, data: bytes) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(BundleCorrupt, match="manifest.json"):
        load_manifest(path)


def test_golden_data_comes_back(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    golden = read_golden(path)
    assert golden.texts == TEXTS
    assert golden.input_ids.shape == golden.attention_mask.shape
    assert golden.reference.shape == golden.embeddings.shape == (32, DIM)
    assert [len(ids) for ids in golden.token_ids()] == [len(text.split()) for text in TEXTS]
    with np.load(path / "golden.npz", allow_pickle=False) as archive:
        assert sorted(archive) == ["attention_mask", "embeddings", "input_ids", "pad_id", "reference"]


def test_a_pickle_in_the_golden_file_is_not_run(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    np.savez(path / "golden.npz", input_ids=np.array([{}], dtype=object))
    with pytest.raises(BundleCorrupt, match="golden.npz"):
        read_golden(path)


@pytest.mark.parametrize("content", ["", '{"text": 1}\n' * 32, '{"txt": "a"}\n', "not json\n", '{"text": "a"}\n'])
def test_bad_golden_texts_are_named(tmp_path: Path, content: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (path / "golden.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(BundleCorrupt, match="golden"):
        read_golden(path)


def test_the_card_shows_what_is_judged_with_other_settings_too(tmp_path: Path) -> None:
    other = SettingReport(name="hint=bf16", ran_on="device", measures=MEASURES, reason=None)
    report = make_report(make_target()).model_copy(update={"other_settings": (other,)})
    path, _ = make_bundle(tmp_path / "out", report=report)
    card = " ".join((path / "README.md").read_text(encoding="utf-8").split())
    found = MEASURES
    assert (
        f"With hint=bf16 (device): centred cosine {found.centred_cosine_mean:.5f} mean, "
        f"{found.centred_cosine_min:.5f} worst text, regret@10 {found.regret_mean:.5f}, other padding"
    ) in card
    assert "overlap" not in card.partition("With hint=bf16")[2]


def code_blocks(card: str) -> list[str]:
    return [part.split("\n", 1)[1] for part in card.split("```")[1::2]]


def test_the_card_shows_the_numbers_and_the_way_without_edgeq_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_on = RunsOn(machine="x86_64", cpu_flags_all=("avx2",), cpu_flags_any=("avx512_vnni", "avx_vnni"))
    path, _ = make_bundle(tmp_path / "out", target=make_target(runs_on=runs_on), prompts={"query": "ask: "})
    card = (path / "README.md").read_text(encoding="utf-8")
    for expected in (
        "| centred cosine, worst text | 0.99510 | >= 0.993 |",
        "Status: **passed**, over 512 texts",
        "Ran on `device`",
        "all needed: `avx2`",
        "one needed: `avx512_vnni`, `avx_vnni`",
        '- query: `"ask: "`',
        'SentenceTransformer(".", backend="onnx")',
        "onnx 1",
    ):
        assert expected in card, expected
    (code,) = [block for block in code_blocks(card) if "import onnxruntime" in block]
    monkeypatch.chdir(path)
    for texts in (["how do i reset my password", "thanks"], list(TEXTS)):
        assert 'texts = ["How do I reset' in code
        lines = [f"texts = {texts!r}" if line.startswith("texts = ") else line for line in code.split("\n")]
        names: dict[str, object] = {}
        exec("\n".join(lines), names)
        vectors = names["vectors"]
        assert isinstance(vectors, np.ndarray)
        assert vectors.shape == (len(texts), DIM)
    np.testing.assert_allclose(vectors, read_golden(path).embeddings, atol=1e-6)


def test_a_card_without_hidden_state_does_not_promise_sentence_transformers(tmp_path: Path) -> None:
    from edgeq.bundle.model_card import render_card

    _, manifest = make_bundle(tmp_path / "out")
    qdq = manifest.qdq_model.model_copy(update={"outputs": ("sentence_embedding",)})
    bare: Manifest = manifest.model_copy(update={"qdq_model": qdq})
    assert "backend=" not in render_card(bare, make_report(make_target()), 0)


def test_a_moved_bundle_verifies(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    shutil.move(path, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "out-inputs-0")
    assert verify(tmp_path / "elsewhere").status == "passed"
