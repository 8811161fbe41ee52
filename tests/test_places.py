"""The device script runs here as a place, its reports are read strictly, and the verb shows and keeps them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_device import edit_manifest, ort_bundle

from edgeq import cli
from edgeq.bundle.verify import verify
from edgeq.devices.child_process import Log, follow, require_report
from edgeq.devices.contract import Job
from edgeq.devices.report import DeviceReport, keep_report, parse_report, read_report, report_path, reports_of
from edgeq.devices.transports import Access, transport_of
from edgeq.errors import BundleCorrupt, ConfigError, LoweringFailed, TimedOut, ToolMissing, error_of
from edgeq.records import RunsOn


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ort_bundle(tmp_path_factory.mktemp("places") / "out")


@pytest.fixture(scope="module")
def found(made: Path) -> DeviceReport:
    return transport_of("local").validate(Job(made, runs=2, warmup=0))


def test_here_is_a_place(made: Path, found: DeviceReport) -> None:
    assert (found.transport, found.status, found.ran_on) == ("local", "passed", "device")
    assert verify.__module__ and len(list(made.parent.glob("*.device-report.json"))) == 0
    assert found.cells[0].latency.p50_ms <= found.cells[0].latency.p99_ms


def test_reports_are_kept_beside_the_bundle_and_found_again(made: Path, found: DeviceReport, tmp_path: Path) -> None:
    path = keep_report(made, "ssh-me@[::1]/../x-22", found)
    assert path.parent == made.parent and path.name == "tiny-target.ssh-me-1-x-22.device-report.json"
    (made.parent / "other.local.device-report.json").write_text("{}", encoding="utf-8")
    assert reports_of(made) == {path: found}
    assert read_report(path, made) == found
    path.write_text(path.read_text(encoding="utf-8").replace('"passed"', '"failed"'), encoding="utf-8")
    with pytest.raises(BundleCorrupt, match="says failed, but its measures say: passed"):
        reports_of(made)
    path.unlink()
    with pytest.raises(ConfigError, match="letters or digits"):
        report_path(made, "///")


def measured(**changes: float) -> Callable[[dict[str, Any]], object]:
    return lambda report: report["measures"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.update(manifest_sha256="0" * 64), "about another bundle"),
        (lambda report: report.update(target="another"), "about another bundle"),
        (lambda report: report.update(measures=None), "passed without measures"),
        (lambda report: report.update(ran_on="emulator"), "holds times, but ran on emulator"),
        (
            lambda report: report["machine"].update(lacks=["the CPU lacks avx9"]),
            "the device, but the CPU lacks avx9",
        ),
        (measured(texts=3), "measures 3 inputs; the bundle has 32"),
        (measured(invariance_min=0.5), "says passed, but its measures say: invariance"),
        (measured(norm_error_max=0.9), "norm error"),
        (lambda report: report["host"].update(centred_cosine_min=0.1), "centred cosine with the exporting machine"),
        (lambda report: report.update(extra=1), "extra: Extra inputs"),
        (lambda report: report.pop("cells"), "cells: Field required"),
        (measured(spearman=float("nan")), "finite"),
        (lambda report: report["machine"].update(cpu="x\x1b[2J"), "control characters"),
        (lambda report: report["tools"].update({"a\rb": "1"}), "control characters"),
    ],
)
def test_dishonest_reports_are_refused(
    made: Path, found: DeviceReport, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    document = json.loads(found.model_dump_json())
    change(document)
    with pytest.raises(BundleCorrupt, match=message):
        parse_report(json.dumps(document).encode(), "report", made)


def test_reports_of_any_size_depth_or_kind_are_refused(made: Path) -> None:
    for content in (b"x" * 1_000_001, b"[" * 100_000, b"\xff", b"", b"[]"):
        with pytest.raises(BundleCorrupt, match=r"^report: "):
            parse_report(content, "report", made)


def test_exit_codes_are_errors_and_back() -> None:
    log = Log(lambda stage, done, total: None)
    log("[validate] run 3/4")
    log("noise \x1b[31m")
    log("validate.py: no such runtime")
    assert log.lines == ["noise [31m", "validate.py: no such runtime"]
    require_report(0, log, "there")
    require_report(6, log, "there")
    for code in (2, 3, 4, 5, 7, 8, 9):
        kind = error_of(code)
        assert kind is not None and kind.exit_code == code
        with pytest.raises(kind, match="^there: no such runtime"):
            require_report(code, log, "there")
    for code, words in ((1, "ended with status 1"), (-11, "died of SIGSEGV"), (139, "died of SIGSEGV")):
        with pytest.raises(LoweringFailed, match=words):
            require_report(code, log, "there")


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_progress_passes_through_and_a_time_limit_ends_all_of_it(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    log = Log(lambda *stage: told.append(stage))
    assert follow(["sh", "-c", "echo '[validate] run 3/4' >&2; exit 6"], log, 30.0, "there") == 6
    assert told == [("run", 3, 4)]
    pid = tmp_path / "pid"
    with pytest.raises(TimedOut, match="there: not done after 2 s"):
        follow(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"], log, 2.0, "there")
    started = int(pid.read_text(encoding="utf-8"))
    end = time.monotonic() + 20  # the signal is sent; a busy machine delivers it when it comes to it
    while _lives(started) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(started)
    with pytest.raises(ToolMissing, match="is not there"):
        follow([str(tmp_path / "none")], log, 2.0, "there")


@pytest.mark.parametrize("where", ["", "here", "http://x", "local ", "arm"])
def test_what_is_no_place_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        transport_of(where)


def test_a_python_is_named_for_other_machines_only() -> None:
    for where in ("local", "arm64"):
        with pytest.raises(ConfigError, match="has a Python of its own"):
            transport_of(where, Access(python="/other/python"))


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


def test_the_verb_shows_and_keeps_the_report(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", made, "--on", "local", "--runs", 2) == 0
    shown = capsys.readouterr()
    assert "passed, ran on device (local:" in shown.out and " ms" in shown.out and "run" in shown.err
    kept = made.parent / "tiny-target.local.device-report.json"
    assert str(kept) in shown.out.replace("\n", "")
    assert run("validate", made, "--on", "local", "--runs", 2, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("report") == str(kept)
    assert DeviceReport.model_validate(document) == read_report(kept, made)
    kept.unlink()


def test_no_time_is_shown_where_it_is_not_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = RunsOn(machine="another", cpu_flags_all=(), cpu_flags_any=())
    assert run("validate", ort_bundle(tmp_path / "out", runs_on=elsewhere), "--on", "local") == 0
    shown = capsys.readouterr().out
    assert "host-kernels" in shown and " ms" not in shown and "latency" not in shown


def test_a_missed_gate_is_shown_kept_and_exits_with_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ort_bundle(tmp_path / "out")
    edit_manifest(path, lambda manifest: manifest["target"]["gate"].update(exactness_min=1.1))
    assert run("validate", path, "--on", "local", "--runs", 2) == 6
    assert "misses the gate of tiny-target there: exactness: centred" in capsys.readouterr().err.replace("\n", " ")
    assert [report.status for report in reports_of(path).values()] == ["failed"]


def test_what_to_compare_on_does_not_go_with_a_place(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", made, "--on", "local", "--texts", "x.txt", "--column", "a") == 2
    assert "drop --texts and --column" in capsys.readouterr().err


def test_a_damaged_bundle_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ort_bundle(tmp_path / "out")
    with (path / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    assert run("validate", path, "--on", "local") == 7
    assert "tokenizer.json" in capsys.readouterr().err
