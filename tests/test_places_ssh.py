"""A bundle is validated over a real sshd on loopback; what may go wrong is one message and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import loopback_sshd
import numpy as np
import pytest
from loopback_sshd import Sshd
from tiny_device import ort_bundle

from edgeq.bundle.checksums import write_sums
from edgeq.devices.contract import Job
from edgeq.devices.transports import Access, transport_of
from edgeq.errors import ConfigError, DeviceUnavailable, StorageFailed, TimedOut, ToolMissing

LARGE = 3_000_000


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    made = loopback_sshd.start(tmp_path_factory.mktemp("ssh") / "server")
    if isinstance(made, str):
        pytest.skip(made)
    yield made
    made.stop()


@pytest.fixture
def sshd(running: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    monkeypatch.setenv("PATH", f"{running.bin}:{os.environ['PATH']}")
    running.configure()
    running.bytes_sent()
    subprocess.run(["rm", "-rf", running.folder / "home"], check=True)
    (running.folder / "home").mkdir()
    return running


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return ort_bundle(tmp_path / "out")


def job(path: Path, **changes: float) -> Job:
    return Job(path, runs=2, warmup=0, **changes)  # type: ignore[arg-type]


def access(**changes: object) -> Access:
    return Access(**{"python": sys.executable, **changes})  # type: ignore[arg-type]


def left_there(sshd: Sshd) -> list[str]:
    """Name what runs left, once the far end had time to notice that the connection is gone."""
    for _ in range(100):
        left = [path.name for path in (sshd.there / "runs").iterdir()]
        if not left:
            break
        time.sleep(0.1)
    return left


@pytest.mark.ssh
def test_names_that_a_shell_would_read_are_only_names(sshd: Sshd, tmp_path: Path) -> None:
    path = ort_bundle(tmp_path / "out")
    odd = path.rename(tmp_path / "a 'b' \"c\"; touch pwned\n$(touch pwned)")
    (odd / "q'u\"o; touch pwned $(x).txt").write_text("odd", encoding="utf-8")
    write_sums(odd)
    where = f"{sshd.where}/f o'l\"d; touch pwned"
    found = transport_of(where, access()).validate(job(odd))
    assert (found.status, found.transport, found.ran_on) == ("passed", "ssh", "device")
    assert found.host is not None and found.host.max_abs_error < 1e-6
    assert not list(tmp_path.rglob("pwned")) and not list(sshd.folder.rglob("pwned"))
    assert not (Path.home() / "pwned").exists()


@pytest.mark.ssh
def test_validating_again_sends_less_than_100_kb_and_heals_what_was_damaged_there(sshd: Sshd, made: Path) -> None:
    (made / "large.bin").write_bytes(np.random.default_rng(0).bytes(LARGE))
    write_sums(made)
    place = transport_of(sshd.where, access())
    place.validate(job(made))
    assert sshd.bytes_sent() > LARGE
    assert left_there(sshd) == []
    again = place.validate(job(made))
    assert again.status == "passed"
    assert sshd.bytes_sent() < 100_000
    damaged = next(path for path in (sshd.there / "store").iterdir() if path.stat().st_size == LARGE)
    damaged.write_bytes(b"x" * LARGE)
    assert place.validate(job(made)).status == "passed"
    assert LARGE < sshd.bytes_sent() < LARGE + 200_000


@pytest.mark.ssh
def test_a_dropped_connection_goes_on_where_it_was(sshd: Sshd, made: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = 4 * LARGE
    (made / "large.bin").write_bytes(np.random.default_rng(1).bytes(size))
    write_sums(made)
    sshd.break_after(3 * LARGE)
    found = transport_of(sshd.where, access()).validate(job(made))
    assert found.status == "passed"
    assert "making it again" in caplog.text
    assert size < sshd.bytes_sent() < size + 3_000_000  # sshd drops what it holds, 2 MB at most; anew it would be 9 MB


@pytest.mark.ssh
def test_a_place_that_keeps_nothing_is_empty_afterwards(sshd: Sshd, made: Path) -> None:
    transport_of(sshd.where, access(is_kept=False)).validate(job(made))
    assert list((sshd.folder / "home").iterdir()) == []


@pytest.mark.ssh
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "stranger"}, "Permission denied.*ssh-copy-id"),
        ({"known": "known_other"}, "(?i)host key.*connect once by hand"),
        ({"known": "known_nobody"}, "(?i)host key.*connect once by hand"),
    ],
    ids=["wrong key", "changed host key", "unknown host key"],
)
def test_who_is_not_let_in_is_told_why(sshd: Sshd, made: Path, changes: dict[str, str], message: str) -> None:
    sshd.configure(**changes)
    with pytest.raises(DeviceUnavailable, match=message):
        transport_of(sshd.where, access()).validate(job(made))
    assert not sshd.there.exists()


@pytest.mark.ssh
def test_nobody_there_is_a_message(sshd: Sshd, made: Path) -> None:
    (sshd.folder / "config").write_text("", encoding="utf-8")
    with pytest.raises(DeviceUnavailable, match="refused.*Check the address"):
        transport_of("ssh://127.0.0.1:1", access()).validate(job(made))


@pytest.mark.ssh
def test_a_missing_python_and_a_missing_runtime_are_named(sshd: Sshd, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match=r"/nowhere/python did not run.*Install Python 3.8"):
        transport_of(sshd.where, access(python="/nowhere/python")).validate(job(made))
    python = without(tmp_path, "raise ImportError('not here')")
    with pytest.raises(ToolMissing, match="-m pip install onnxruntime"):
        transport_of(sshd.where, access(python=python)).validate(job(made))
    assert left_there(sshd) == []


def without(folder: Path, code: str) -> str:
    """Give a Python in which importing the runtime does something else."""
    (folder / "shadow").mkdir()
    (folder / "shadow" / "onnxruntime.py").write_text(f"{code}\n", encoding="utf-8")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/shadow exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return str(python)


@pytest.mark.ssh
def test_a_time_limit_ends_what_runs_there(sshd: Sshd, made: Path, tmp_path: Path) -> None:
    python = without(tmp_path, f"import time; open({str(tmp_path / 'started')!r}, 'w'); time.sleep(300)")
    begin = time.monotonic()
    with pytest.raises(TimedOut, match="longer --time-limit"):
        transport_of(sshd.where, access(python=python)).validate(job(made, time_limit_s=8.0))
    assert time.monotonic() - begin < 60
    assert (tmp_path / "started").exists()
    assert left_there(sshd) == []


@pytest.mark.ssh
def test_a_script_that_dies_there_is_a_message(sshd: Sshd, made: Path, tmp_path: Path) -> None:
    from edgeq.errors import LoweringFailed

    python = without(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(LoweringFailed, match="died of SIGSEGV"):
        transport_of(sshd.where, access(python=python)).validate(job(made))
    assert left_there(sshd) == []


@pytest.mark.ssh
def test_a_full_disk_there_is_a_message_and_gets_its_space_back(sshd: Sshd, made: Path) -> None:
    small = sshd.folder / "home" / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here: run as root")
    try:
        (made / "large.bin").write_bytes(np.random.default_rng(2).bytes(LARGE))
        write_sums(made)
        with pytest.raises(StorageFailed, match="No space left on device.*Free some space there"):
            transport_of(f"{sshd.where}/small", access()).validate(job(made))
        assert not list((small / "edgeq-device" / "store").glob("*.part"))
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize(
    "where",
    ["ssh://", "ssh://-oProxyCommand=x", "ssh://a@-b", "ssh://a b", "ssh://host:0", "ssh://host:99999", "ssh://h;x",
     "telnet://host", "ssh://user@host\n", "ssh://$(x)@host"],
)  # fmt: skip
def test_what_is_no_address_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        transport_of(where)


@pytest.mark.parametrize("python", ["python3; touch x", "$(x)", "a b", "-x", "", "`x`", "py\nthon"])
def test_a_python_that_a_shell_would_read_is_refused(python: str) -> None:
    with pytest.raises(ConfigError, match="holds what a shell reads"):
        transport_of("ssh://host", Access(python=python))


def test_addresses_are_taken_apart() -> None:
    command = transport_of("ssh://me@[::1]:2222/x").command()  # type: ignore[attr-defined]
    assert command[:2] == ["ssh", "-T"] and "BatchMode=yes" in command
    assert command[command.index("-p") + 1] == "2222" and command[-2] == "me@::1"
    assert not [word for word in command if "HostKeyChecking" in word]
    assert len(command[-1]) < 8000  # what a command line of Windows takes
