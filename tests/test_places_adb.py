"""A bundle is validated through `adb`: the program is a stand-in, and no phone has been seen."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import stand_in_adb
from tiny_device import ort_bundle, tflite_bundle

from edgeq.bundle.checksums import write_sums
from edgeq.devices import adb as adb_place
from edgeq.devices.contract import Job
from edgeq.devices.transports import Access, transport_of
from edgeq.errors import (
    ConfigError,
    DeviceUnavailable,
    LoweringFailed,
    StorageFailed,
    TimedOut,
    ToolMissing,
    Unsupported,
)

WHERE = "adb:R58M123"


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "adb"
    monkeypatch.setenv("PATH", f"{stand_in_adb.install(folder)}:{os.environ['PATH']}")
    monkeypatch.setattr(adb_place, "_BACK_OFF_S", 0.0)
    return folder


def job(path: Path, **changes: float) -> Job:
    return Job(path, runs=2, warmup=0, **changes)  # type: ignore[arg-type]


def access(**changes: object) -> Access:
    return Access(**{"python": sys.executable, **changes})  # type: ignore[arg-type]


def pushed(phone: Path) -> int:
    path = phone / "pushed"
    total = sum(map(int, path.read_text(encoding="utf-8").split())) if path.exists() else 0
    path.unlink(missing_ok=True)
    return total


def runs_left(phone: Path) -> list[Path]:
    return list((phone / "phone" / "edgeq-device" / "runs").iterdir())


def test_a_bundle_with_odd_names_is_validated_and_only_changes_are_sent_again(phone: Path, tmp_path: Path) -> None:
    path = ort_bundle(tmp_path / "out").rename(tmp_path / "a 'b' \"c\"; touch pwned\n$(touch pwned)")
    for name in ("q'u\"o; touch pwned $(touch pwned).txt", "-n"):
        (path / name).write_text("odd", encoding="utf-8")
    write_sums(path)
    place = transport_of(WHERE, access())
    found = place.validate(job(path))
    assert (found.status, found.transport, found.measures is not None) == ("passed", "adb", True)
    assert pushed(phone) > 10_000 and runs_left(phone) == []
    assert place.validate(job(path)).status == "passed"
    assert pushed(phone) == 0
    assert not list(tmp_path.rglob("pwned"))


def test_what_was_damaged_on_the_phone_is_sent_again(phone: Path, tmp_path: Path) -> None:
    path, place = ort_bundle(tmp_path / "out"), transport_of(WHERE, access())
    place.validate(job(path))
    pushed(phone)
    some = max((phone / "phone" / "edgeq-device" / "store").iterdir(), key=lambda file: file.stat().st_size)
    some.write_bytes(b"damaged")
    assert place.validate(job(path)).status == "passed"
    assert pushed(phone) > 1000


def test_a_shaken_cable_is_tried_again_and_a_loose_one_is_a_message(phone: Path, tmp_path: Path) -> None:
    path, place = ort_bundle(tmp_path / "out"), transport_of(WHERE, access())
    (phone / "fail_push").write_text("2", encoding="utf-8")
    assert place.validate(job(path)).status == "passed"
    transport_of(WHERE, access(is_kept=False)).validate(job(path))
    assert not (phone / "phone" / "edgeq-device").exists()
    (phone / "fail_push").write_text("99", encoding="utf-8")
    with pytest.raises(DeviceUnavailable, match="cannot be sent.*Check the cable"):
        place.validate(job(path))


@pytest.mark.parametrize(
    ("steer", "error", "message"),
    [
        ("offline", DeviceUnavailable, "device offline.*adb devices"),
        ("unauthorized", DeviceUnavailable, "unauthorized.*allow this"),
        ("full", StorageFailed, "storage is full"),
    ],
)
def test_phones_that_cannot_be_used_are_said(
    phone: Path, tmp_path: Path, steer: str, error: type[Exception], message: str
) -> None:
    (phone / steer).touch()
    with pytest.raises(error, match=message):
        transport_of(WHERE, access()).validate(job(ort_bundle(tmp_path / "out")))


def test_exit_codes_of_the_phones_shell_become_errors(phone: Path, tmp_path: Path) -> None:
    path = ort_bundle(tmp_path / "out")
    with pytest.raises(ToolMissing, match="nowhere/python does not run on the phone.*--native"):
        transport_of(WHERE, access(python="/nowhere/python")).validate(job(path))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(LoweringFailed, match="died of SIGSEGV"):
        transport_of(WHERE, access(python=str(python))).validate(job(path))
    python.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    with pytest.raises(TimedOut, match="longer --time-limit"):
        transport_of(WHERE, access(python=str(python))).validate(job(path, time_limit_s=4.0))
    assert runs_left(phone) == []


def test_another_phone_and_a_missing_adb_are_said(phone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ort_bundle(tmp_path / "out")
    with pytest.raises(DeviceUnavailable, match="not found"):
        transport_of("adb:another", access()).validate(job(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="adb is not on PATH"):
        transport_of(WHERE, access()).validate(job(path))


@pytest.mark.parametrize("where", ["adb:", "adb:-s", "adb:a b", "adb:a;b", "adb:$(x)"])
def test_what_is_no_serial_number_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="names no device"):
        transport_of(where)


def test_a_native_binary_must_be_there_and_is_for_phones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        transport_of(WHERE, Access(native=tmp_path / "none"))
    with pytest.raises(ConfigError, match="is for adb:SERIAL"):
        transport_of("local", Access(native=tmp_path / "none"))


@pytest.mark.tflite
def test_a_phone_without_python_runs_the_native_binary(phone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason='pip install "edgeq[tflite]"')
    path = tflite_bundle(tmp_path / "out", lengths=(16,), texts=4)
    found = transport_of(WHERE, Access(native=stand_in_adb.native_binary(tmp_path))).validate(job(path))
    assert (found.transport, found.status, found.cells) == ("adb-native", "passed", ())
    assert found.host is not None and found.host.max_abs_error == 0.0
    assert found.measures is not None and found.measures.cosine_mean < 0.99999
    assert runs_left(phone) == []


def test_the_native_binary_takes_tflite_files_only(phone: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="--native runs .tflite files"):
        access_ = Access(native=stand_in_adb.native_binary(tmp_path))
        transport_of(WHERE, access_).validate(job(ort_bundle(tmp_path / "out")))
