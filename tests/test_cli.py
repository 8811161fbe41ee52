from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import MEASURES, TEXTS, TinyBackend, make_bundle, make_target

import edgeq
from edgeq import cli, errors
from edgeq.backends import doctor
from edgeq.backends.registry import BACKENDS
from edgeq.bundle.golden import read_golden
from edgeq.cli import console
from edgeq.pipeline import export as pipeline
from edgeq.pipeline.bundling import Exported
from edgeq.pipeline.request import ExportRequest

TARGET = "x86-64-onnxruntime"
EXPORT = ["export", "some-model", "--target", TARGET, "--out", "out"]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "out")[0]


def exported(status: str = "passed", **changes: object) -> Exported:
    fields = {
        "target": TARGET,
        "path": f"out/{TARGET}",
        "report": "",
        "status": status,
        "ran_on": "device",
        "parity": MEASURES,
        "size_bytes": 23_000_000,
        "failures": ("centred cosine min is 0.5; at least 0.99 is needed.",) if status == "failed" else (),
    }
    return Exported.model_validate(fields | changes)


def stand_in(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[ExportRequest], tuple[Exported, ...]]
) -> list[ExportRequest]:
    requests: list[ExportRequest] = []

    def export(request: ExportRequest, progress: Callable[[str, int, int], None]) -> tuple[Exported, ...]:
        requests.append(request)
        progress("observe", 0, 2)
        progress("observe", 2, 2)
        return act(request)

    monkeypatch.setattr(pipeline, "export", export)
    return requests


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def act(request: ExportRequest) -> tuple[Exported, ...]:
        raise error

    stand_in(monkeypatch, act)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"edgeq {edgeq.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["export"],
        ["export", "model", "--out", "out"],
        ["export", "model", "--target", TARGET],
        [*EXPORT, "--samples", "0"],
        [*EXPORT, "--seed", "x"],
        ["verify"],
        ["cache", "burn"],
        ["embed", "bundle"],
    ],
)
def test_wrong_usage_exits_2_and_keeps_stdout_clean(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err


@pytest.mark.parametrize("value", ["", "0", "16,", "16,-1", "16;32", "a"])
def test_a_wrong_list_of_numbers_exits_2(value: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", str(path), "--sequence", value, "--alone"]) == 2
    assert "--sequence" in capsys.readouterr().err


def test_an_unknown_target_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", "model", "--target", "x86-64-onnxruntim", "--out", "out"]) == 2
    found = capsys.readouterr()
    assert TARGET in found.err
    assert "Traceback" not in found.err
    assert found.out == ""


def test_targets_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["targets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["targets"]
    assert [item["name"] for item in listed] == sorted(item["name"] for item in listed)
    for item in listed:
        assert list(item) == ["name", "backend", "scheme", "runs_on", "available", "reason"]
        assert item["available"] is (item["reason"] is None)


def test_one_target_is_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["targets", TARGET]) == 0
    assert json.loads(capsys.readouterr().out)["gate"]["float_fallbacks_max"] == 0


def test_a_target_whose_tool_is_missing_is_not_available(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Missing(TinyBackend):
        def tools(self) -> dict[str, str]:
            raise errors.ToolMissing("no compiler: pip install compiler")

    monkeypatch.setitem(BACKENDS, "onnxruntime", Missing())  # type: ignore[arg-type]
    assert cli.run(["targets", "--json"]) == 0
    found = [item for item in json.loads(capsys.readouterr().out)["targets"] if item["backend"] == "onnxruntime"]
    assert found
    for item in found:
        assert not item["available"]
        assert "pip install compiler" in item["reason"]


def test_export_hands_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = stand_in(monkeypatch, lambda request: (exported(),))
    options = ["--texts", "t.csv", "--column", "body", "--validation", "v.txt", "--pooling", "cls", "--samples", "7"]
    options += ["--seed", "3", "--evaluation", "a.jsonl", "--evaluation", "b.jsonl", "--target", TARGET]
    flags = ["--no-hidden-state", "--keep-failed", "--overwrite", "--dry-run", "--no-cache"]
    assert cli.run([*EXPORT, *options, *flags]) == 0
    (request,) = requests
    assert (request.model, request.out, [target.name for target in request.targets]) == (
        "some-model",
        Path("out"),
        [TARGET],
    )
    assert (request.texts, request.column, request.validation) == (Path("t.csv"), "body", Path("v.txt"))
    assert (request.pooling, request.samples, request.seed) == ("cls", 7, 3)
    assert request.evaluation == (Path("a.jsonl"), Path("b.jsonl"))
    assert not request.hidden_state
    assert request.keep_failed and request.overwrite and request.dry_run
    assert not request.cache.root.exists()  # the temporary cache is gone again


def test_export_by_default_keeps_the_hidden_state_and_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (request,) = (stand_in(monkeypatch, lambda request: (exported(),)), cli.run(EXPORT))[0]
    assert request.hidden_state
    assert not (request.keep_failed or request.overwrite or request.dry_run)
    assert request.cache.root == tmp_path / "cache"


def test_export_as_json_is_the_documented_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = (exported(), exported("not-run", path="", parity=None, ran_on="not-run"))
    stand_in(monkeypatch, lambda request: results)
    assert cli.run([*EXPORT, "--json"]) == 0
    found = capsys.readouterr()
    first, second = json.loads(found.out)["bundles"]
    assert list(first) == [
        "target", "path", "status", "ran_on", "parity", "size_bytes", "other_settings", "islands", "promotion",
        "end_to_end",
    ]  # fmt: skip
    assert first["parity"]["centred_cosine_mean"] == MEASURES.centred_cosine_mean
    assert (second["path"], second["parity"], second["status"]) == (None, None, "not-run")
    assert "observe" in found.err


def test_a_failed_gate_prints_the_result_and_exits_6(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, lambda request: (exported(), exported("failed", path="", report="out/a.parity.json")))
    assert cli.run([*EXPORT, "--json"]) == 6
    found = capsys.readouterr()
    assert [item["status"] for item in json.loads(found.out)["bundles"]] == ["passed", "failed"]
    assert "centred cosine min is 0.5" in found.err
    assert "The report is out/a.parity.json." in found.err


@pytest.mark.parametrize("kind", edgeq.EdgeqError.__subclasses__())
def test_every_error_gives_its_exit_code_and_one_message(
    kind: type[edgeq.EdgeqError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, kind("somewhere: [found] this; that is needed. Do so."))
    assert cli.run([*EXPORT, "-q"]) == kind.exit_code
    found = capsys.readouterr()
    assert found.err == "edgeq: somewhere: [found] this; that is needed. Do so.\n"
    assert found.out == ""


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (OSError(errno.ENOSPC, "full", "out/x"), 8, "out/x"),
        (OSError(errno.EROFS, "read-only"), 8, "Read-only"),
        (MemoryError(), 8, "memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_the_machine_s_own_failures_have_codes(
    error: BaseException, code: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error)
    assert cli.run(EXPORT) == code
    found = capsys.readouterr()
    assert word in found.err
    assert "Traceback" not in found.err


def test_another_os_error_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OSError(errno.EBADF, "bad descriptor"))
    with pytest.raises(OSError, match="bad descriptor"):
        cli.run(EXPORT)


def _with_defect(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, edgeq.cli, edgeq.targets\n"
        "def broken(directory=None): raise ZeroDivisionError('a secret place')\n"
        "edgeq.targets.list_targets = broken\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        "sys.exit(edgeq.cli.main())\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_defect_exits_1_without_a_traceback_unless_asked_for() -> None:
    plain = _with_defect("targets")
    assert plain.returncode == 1
    assert "Traceback" not in plain.stderr
    assert "report" in plain.stderr
    assert "a secret place" in plain.stderr
    for arguments in (("-v", "-v", "targets"), ("targets", "-vv")):
        loud = _with_defect(*arguments)
        assert loud.returncode == 1
        assert "Traceback" in loud.stderr


def test_ctrl_c_ends_a_real_process_with_130() -> None:
    code = (
        "import signal, sys, time, edgeq.cli, edgeq.targets\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background inherits it ignored
        "def slow(directory=None): sys.stderr.write('ready\\n'); sys.stderr.flush(); time.sleep(60)\n"
        "edgeq.targets.list_targets = slow\n"
        "sys.argv[1:] = ['targets']\n"
        "sys.exit(edgeq.cli.main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, log = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in log


def test_verify_says_what_it_did(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["golden_texts"] == len(TEXTS)
    assert cli.run(["verify", str(path)]) == 0
    assert "whole" in capsys.readouterr().out


def test_verify_names_a_flipped_byte(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = path / "onnx" / "model.onnx"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert cli.run(["verify", str(path)]) == 7
    assert "onnx/model.onnx" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["verify", "validate", "bench"])
def test_no_bundle_exits_2(verb: str, tmp_path: Path) -> None:
    assert cli.run([verb, str(tmp_path / "nothing")]) == 2


def test_embed_writes_vectors_from_a_file(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    assert cli.run(["embed", str(path), "--texts", str(texts), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    np.testing.assert_allclose(np.load(out), read_golden(path).embeddings, atol=1e-6)


def _embed_stdin(path: Path, out: Path, data: bytes) -> subprocess.CompletedProcess[bytes]:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny_bundle import TinyBackend; from edgeq import cli; from edgeq.backends import registry\n"
        "registry.BACKENDS['tiny'] = TinyBackend()\n"
        "sys.exit(cli.run(['embed', sys.argv[2], '--out', sys.argv[3]]))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(path), str(out)]
    return subprocess.run(command, input=data, capture_output=True, check=False)


def test_embed_reads_standard_input(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    found = _embed_stdin(path, out, ("\n\n".join(TEXTS) + "\n").encode())
    assert found.returncode == 0, found.stderr
    vectors = np.load(out)
    assert len(vectors) == 2 * len(TEXTS) - 1  # a blank line has its vector
    np.testing.assert_allclose(vectors[::2], read_golden(path).embeddings, atol=1e-6)
    np.testing.assert_array_equal(vectors[1::2], np.broadcast_to(vectors[1], vectors[1::2].shape))


def test_embed_gives_every_record_its_row(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, out, listed = tmp_path / "texts.csv", tmp_path / "vectors.npy", tmp_path / "vectors.skipped.txt"
    texts.write_text(f"id,text\n1,{TEXTS[0]}\n2,\n3,{TEXTS[1]}\n", encoding="utf-8")
    command = ["embed", str(path), "--texts", str(texts), "--out", str(out), "--json"]
    assert cli.run(command) == 0
    every = np.load(out)
    assert every.shape[0] == 3 and not listed.exists()
    np.testing.assert_allclose(every[[0, 2]], read_golden(path).embeddings[:2], atol=1e-6)
    assert cli.run([*command, "--skip-blank"]) == 0
    np.testing.assert_array_equal(np.load(out), every[[0, 2]])
    assert listed.read_text(encoding="ascii") == "1\n"
    told = capsys.readouterr()
    assert json.loads(told.out[told.out.rindex("{") :])["skipped"] == 1 and "1 blank record is left out" in told.err
    texts.write_text("text\n \n", encoding="utf-8")
    assert cli.run([*command, "--skip-blank"]) == 2


@pytest.mark.parametrize("data", [b"", b"good\n\xff\n"])
def test_embed_refuses_bad_standard_input_and_writes_nothing(path: Path, tmp_path: Path, data: bytes) -> None:
    out = tmp_path / "vectors.npy"
    found = _embed_stdin(path, out, data)
    assert found.returncode == 2
    assert b"standard input" in found.stderr
    assert b"Traceback" not in found.stderr
    assert sorted(item.name for item in tmp_path.iterdir() if "vectors" in item.name) == []


def test_embed_puts_the_prompt_of_a_role_before_each_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = make_bundle(tmp_path / "out", prompts={"query": "please send "})
    texts, found, expected = tmp_path / "texts.txt", tmp_path / "query.npy", tmp_path / "prompt.npy"
    texts.write_text("it\npassword\n", encoding="utf-8")
    command = ["embed", str(path), "--texts", str(texts), "--out"]
    assert cli.run([*command, str(found), "--role", "query"]) == 0
    assert cli.run([*command, str(expected), "--prompt", "query"]) == 0
    np.testing.assert_array_equal(np.load(found), np.load(expected))
    assert cli.run([*command, str(expected), "--role", "document"]) == 0
    assert not np.array_equal(np.load(found), np.load(expected))
    capsys.readouterr()
    assert cli.run([*command, str(tmp_path / "no.npy"), "--prompt", "passage"]) == 2
    assert "prompt_name is 'passage'; the model has query" in capsys.readouterr().err
    assert cli.run([*command, str(tmp_path / "no.npy"), "--prompt", "query", "--role", "query"]) == 2
    assert "Give one of them" in capsys.readouterr().err
    assert not (tmp_path / "no.npy").exists()


def test_embed_wants_npy(path: Path, tmp_path: Path) -> None:
    assert cli.run(["embed", str(path), "--texts", "t.txt", "--out", str(tmp_path / "vectors.json")]) == 2


def test_validate_and_evaluate_need_the_float_model(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "sts.tsv"
    lines = [f"{TEXTS[i]}\t{TEXTS[i + 1]}\t{i}" for i in range(10)]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n", encoding="utf-8")
    for arguments in (["validate", str(path)], ["evaluate", str(path), "--sts", str(pairs)]):
        assert cli.run(arguments) == 2
        assert "--against" in capsys.readouterr().err
        assert cli.run([*arguments, "--against", str(path / "onnx" / "model.onnx")]) == 2
        assert "is not the float model" in capsys.readouterr().err


def test_evaluate_wants_data(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", str(path)]) == 2
    assert "--sts" in capsys.readouterr().err


def test_inspect_shows_a_bundle_s_artifact(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(path), "--json"]) == 0
    anatomy = json.loads(capsys.readouterr().out)
    assert anatomy["file"] == "onnx/model.onnx"
    assert anatomy["operators"]["ReduceL2"] == {"float32": 1}
    assert "manifest.json" in anatomy["bundle_files"]
    assert cli.run(["inspect", str(path)]) == 0
    assert "ReduceL2" in capsys.readouterr().out


def test_doctor_installs_what_lives_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    monkeypatch.setattr(doctor.environments, "interpreter", lambda found: asked.append(found.name))
    monkeypatch.setattr(doctor.environments, "find_interpreter", lambda found: Path("python") if asked else None)
    assert cli.run(["doctor", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)["toolchains"]}
    assert listed["rknn-toolkit2"]["install"] == "edgeq doctor --install rknn-toolkit2"
    assert cli.run(["doctor", "--install", "rknn-toolkit2", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["toolchains"]
    assert found["versions"]["rknn-toolkit2"] == "2.5.0" and found["install"] is None and asked == ["rknn-toolkit2"]
    assert cli.run(["doctor", "--install", "toolkit"]) == 2
    assert "no such environment; known are rknn-toolkit2, tflite-runtime" in capsys.readouterr().err


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "export", ("numpy", "no-such-package"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert cli.run(["doctor", "--json"]) == 0
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["toolchains"]}
    assert found["export"]["missing"] == ["no-such-package"]
    assert found["export"]["versions"] == {"numpy": np.__version__}
    assert "edgeq[export]" in found["export"]["install"]
    assert "onnxruntime" in found["onnxruntime"]["versions"]
    assert found["qemu-x86_64-static"]["install"] == "apt-get install qemu-user-static"


def test_cache_is_shown_and_purged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgeq.system.cache import Cache

    Cache().entry("float-model", "a" * 64, lambda folder: (folder / "model.onnx").write_bytes(b"x" * 1000))  # type: ignore[func-returns-value]
    assert cli.run(["cache", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["size_bytes"] > 1000
    assert shown["entries"][0]["kind"] == "float-model"
    assert shown["path"] == str(tmp_path / "cache")
    assert cli.run(["cache", "purge", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == shown["size_bytes"]
    assert cli.run(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == []


@pytest.mark.parametrize("arguments", [["-q", *EXPORT], [*EXPORT, "-q"]])
def test_quiet_silences_progress(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, lambda request: (exported(),))
    assert cli.run(arguments) == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert TARGET in found.out


@pytest.mark.parametrize(("flags", "level"), [([], logging.WARNING), (["-v"], logging.INFO), (["-vv"], logging.DEBUG)])
def test_verbosity_sets_the_level(flags: list[str], level: int) -> None:
    assert cli.run([*flags, "cache"]) == 0
    assert logging.getLogger("edgeq").level == level
    assert console.verbosity.verbose == len("".join(flags).replace("-", ""))


@pytest.mark.skipif(os.name != "posix", reason="pipes of a POSIX shell")
def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m edgeq targets --json | true"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr


def test_make_target_is_accepted_by_the_listing() -> None:
    from edgeq.cli.targets import _listed

    assert _listed(make_target())["available"] is True


def test_control_characters_of_files_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\x9b\u202eb\ud800\nnext\t日本\u3000語"
    console.put(hostile)
    console.complain(hostile)
    console.put_table(("column",), [[hostile]])
    found = capsys.readouterr()
    for text in (found.out, found.err):
        assert "\x1b[2J" not in text
        assert "a\\x1b[2J\\x9b\\u202eb\\ud800" in text
        assert "日本\u3000語" in text
