"""Private environments: made once, whole or not at all, from a Python that fits; else the message says what to do."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
from test_children import make_inputs, sum_of, tflite_worker, write_adder

from edgeq.errors import StorageFailed, ToolMissing
from edgeq.system import environments
from edgeq.system.cache import Cache
from edgeq.system.environments import KIND, Environment, find_interpreter, interpreter, require_interpreter
from edgeq.system.worker import Worker, unpack_reply

RUNNING = "{}.{}".format(*sys.version_info[:2])
PROBE = Environment("probe", ("edgeq-probe==1.0",), (RUNNING,))
SLOW = Environment("slow", ("edgeq-slow==1.0",), (RUNNING,))
TFLITE = Environment("tflite-runtime", ("tflite-runtime==2.14.0", "numpy==1.26.4"), ("3.11",))


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """Write a wheel of one module that holds its version; `requires` is a line of its metadata."""
    module, information = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}.py": f"VERSION = {version!r}\n",
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        f"{len(text)}\n"
        for path, text in files.items()
    )
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{information}/RECORD": f"{record}{information}/RECORD,,\n"}.items():
            wheel.writestr(path, text)


def write_slow_source(folder: Path, name: str, begun: Path) -> None:
    """Write a source distribution whose build says that it has begun, and then takes for ever."""
    backend = f"import os, time\ndef build_wheel(*_):\n    open({str(begun)!r}, 'w').write(str(os.getpid()))\n"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n',
        "slow.py": f"{backend}    time.sleep(600)\n",
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
    }
    root = f"{name.replace('-', '_')}-1.0"
    with tarfile.open(folder / f"{root}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{root}/{path}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see one folder and nothing else, and edgeq an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "cache"))
    write_wheel(folder, "edgeq-probe", "1.0")
    return folder


@pytest.fixture
def nowhere(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hide every Python but those below the folder it gives: `bin` is PATH, `home` the user's folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def write_python(path: Path, answer: str, status: int = 0, then: str = "echo no environment here >&2; exit 1") -> Path:
    """Write an interpreter that answers the first question so, and goes on as it is told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\nif [ "$2" = -c ]; then echo {answer}; exit {status}; fi\n'
        f'echo "$0" >> {path.parent}/asked\n{then}\n',
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


def version_of(python: Path, module: str) -> str:
    code = f"import {module}; print({module}.VERSION)"
    return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / KIND).iterdir() if path.name.startswith(".")]


# Each environment costs seconds of pip, which is a process of its own: one of these tests runs on every interpreter.


@pytest.mark.pip
@pytest.mark.one_interpreter
def test_what_is_forced_is_installed_without_what_it_asks_for(index: Path) -> None:
    write_wheel(index, "edgeq-asking", "2.0", requires="Requires-Dist: edgeq-nowhere==9\n")
    forced = Environment("asking", ("edgeq-probe==1.0",), (RUNNING,), forced=("edgeq-asking==2.0",))
    assert find_interpreter(forced) is None and find_interpreter(PROBE) is None
    with pytest.raises(ToolMissing, match=r"asking \(edgeq-asking==2\.0\) is not there; .*doctor --install asking"):
        require_interpreter(forced)
    python = interpreter(forced)
    assert version_of(python, "edgeq_asking") == "2.0" and version_of(python, "edgeq_probe") == "1.0"
    assert find_interpreter(forced) == require_interpreter(forced) == python
    assert forced.pins == {"edgeq-asking": "2.0", "edgeq-probe": "1.0"}
    with pytest.raises(ToolMissing, match="edgeq-nowhere"):
        interpreter(Environment("asking", ("edgeq-asking==2.0",), (RUNNING,)))


@pytest.mark.pip
def test_an_environment_is_made_once_and_purged(index: Path) -> None:
    python = interpreter(PROBE)
    assert version_of(python, "edgeq_probe") == "1.0" and python.parent.parent.name.startswith("probe-")
    assert len(python.parent.parent.name) == len("probe-") + 12
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    made = python.parent.stat().st_mtime_ns
    shutil.rmtree(index)  # nothing to install from
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(interpreter, [PROBE] * 4)) == {python}
    assert python.parent.stat().st_mtime_ns == made and leftovers(Cache().root) == []
    (entry,) = Cache().entries()
    assert (entry.kind, entry.path) == (KIND, python.parent.parent) and entry.size_bytes > 1e6
    assert Cache().purge("calibration") == 0 and python.exists()
    assert Cache().purge() == entry.size_bytes and not python.exists() and list(Cache().entries()) == []


@pytest.mark.pip
@pytest.mark.one_interpreter
def test_two_that_want_the_same_make_it_once(index: Path, nowhere: Path) -> None:
    write_python(nowhere / "bin" / "python3.99", "3.99", then=f'exec {sys.executable} "$@"')
    environment = Environment("probe", PROBE.requirements, ("3.99",))
    with ThreadPoolExecutor(3) as pool:
        (python,) = set(pool.map(interpreter, [environment] * 3))
    assert version_of(python, "edgeq_probe") == "1.0"
    assert len((nowhere / "bin" / "asked").read_text().splitlines()) == 1


def test_other_pins_and_another_python_make_another_environment(index: Path, nowhere: Path) -> None:
    names = set()
    for requirements, version in [(("a==1",), "3.98"), (("a==2",), "3.98"), (("a==1",), "3.99")]:
        write_python(nowhere / "bin" / f"python{version}", version)
        with pytest.raises(ToolMissing):
            interpreter(Environment("probe", requirements, (version,)))
        names |= {path.name for path in (Cache().root / KIND).glob("*.lock")}
    assert len(names) == 3


@pytest.mark.pip
@pytest.mark.one_interpreter
@pytest.mark.parametrize("field", ["requirements", "forced"])
def test_all_that_decides_an_environment_is_in_its_name(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {item.name for item in fields(Environment)} == {"name", "requirements", "python_versions", "forced"}
    names = {environments._folder(item, "3.11").name for item in (TFLITE, replace(TFLITE, **{field: ("a==1",)}))}
    names |= {environments._folder(TFLITE, "3.12").name}
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(environments, "machine", lambda machine=machine: machine)
        names |= {environments._folder(TFLITE, "3.11").name}
    assert len(names) == 4


def test_an_environment_whose_python_is_gone_is_made_again(index: Path) -> None:
    python = interpreter(PROBE)
    (python.parent / "python").unlink()
    (python.parent / "python").symlink_to(index / "uninstalled")
    assert interpreter(PROBE) == python and version_of(python, "edgeq_probe") == "1.0"
    assert leftovers(Cache().root) == []


@pytest.mark.pip
@pytest.mark.one_interpreter
def test_what_pip_cannot_install_is_said_with_the_command_to_run(index: Path) -> None:
    with pytest.raises(ToolMissing) as caught:
        interpreter(Environment("probe", ("edgeq-probe==2.0", "more>1"), (RUNNING,)))
    message = str(caught.value)
    assert message.startswith("environment probe: edgeq-probe==2.0 more>1 cannot be installed by ")
    assert "ERROR: No matching distribution found for edgeq-probe==2.0\n" in message
    assert f"{sys.executable} -m venv probe && probe/bin/python -m pip install edgeq-probe==2.0 'more>1'\n" in message
    assert list(Cache().entries()) == [] and leftovers(Cache().root) == []


def test_a_python_that_cannot_make_an_environment_after_all_is_said(nowhere: Path) -> None:
    write_python(nowhere / "bin" / "python3.99", "3.99")
    with pytest.raises(ToolMissing, match=r"cannot be installed by .*python3.99: no environment here\n"):
        interpreter(Environment("probe", PROBE.requirements, ("3.99",)))
    assert list(Cache().entries()) == []
    write_python(nowhere / "bin" / "python3.99", "3.99", then="exit 1")
    with pytest.raises(ToolMissing, match="it said nothing"):
        interpreter(Environment("probe", PROBE.requirements, ("3.99",)))


@pytest.mark.pip
@pytest.mark.one_interpreter
def test_a_killed_pip_leaves_nothing_that_is_taken_for_complete(index: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    write_slow_source(index, "edgeq-slow", begun)
    code = f"from edgeq.system.environments import *\ninterpreter({SLOW!r})"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not begun.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert begun.exists()
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert list(Cache().entries()) == [] and len(leftovers(Cache().root)) == 1
    write_wheel(index, "edgeq-slow", "1.0")
    assert version_of(interpreter(SLOW), "edgeq_slow") == "1.0"
    assert leftovers(Cache().root) == []


def test_a_cache_that_cannot_be_written_is_said(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageFailed, match="a part of the path is a file"):
        interpreter(PROBE)


# --- which Python serves ----------------------------------------------------------------------------------------------


def made_from(environment: Environment) -> str:
    """Give the Python that is chosen: it makes no environment, and the message names it."""
    with pytest.raises(ToolMissing) as caught:
        interpreter(Environment(environment.name, ("edgeq-probe==9",), environment.python_versions))
    found = str(caught.value).partition("cannot be installed by ")[2].partition(":")[0]
    return found or str(caught.value)


@pytest.mark.pip
@pytest.mark.one_interpreter
def test_the_running_python_comes_first(nowhere: Path) -> None:
    write_python(nowhere / "bin" / "python3.99", "3.99")
    write_python(nowhere / "bin" / f"python{RUNNING}", RUNNING)
    assert made_from(Environment("probe", (), ("3.99", RUNNING))) == sys.executable


def test_path_comes_before_pyenv_and_only_what_answers_counts(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment("probe", (), ("3.99",))
    monkeypatch.setenv("PATH", os.pathsep.join(str(nowhere / name) for name in ("bin", "missing", "more")))
    write_python(nowhere / "bin" / "python3.99", "shim: command not found", status=127)
    versions = nowhere / "home" / ".pyenv" / "versions"
    older = write_python(versions / "3.99.2" / "bin" / "python3", "3.99")
    newer = write_python(versions / "3.99.10" / "bin" / "python3", "3.99")
    (versions / "3.99.11").mkdir()
    write_python(versions / "3.99.12-dev" / "bin" / "python3", "3.99")
    assert made_from(environment) == str(newer)
    newer.write_text("not a program")  # OSError: exec format
    assert made_from(environment) == str(older)
    on_path = write_python(nowhere / "more" / "python3.99", "3.99")
    assert made_from(environment) == str(on_path)
    write_python(on_path, "3.98")
    assert made_from(environment) == str(older)


def test_a_python_that_hangs_does_not_count(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.system.environments._PROBE_LIMIT_S", 0.3)
    python = write_python(nowhere / "bin" / "python3.99", "3.99")
    python.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    with pytest.raises(ToolMissing, match=r"python3.99 cannot make environments, and no other is on PATH"):
        interpreter(Environment("probe", ("a==1",), ("3.99",)))


def test_no_python_is_a_message_with_what_to_do(nowhere: Path) -> None:
    with pytest.raises(ToolMissing) as caught:
        interpreter(Environment("probe", ("a==1", "b==2"), ("3.98", "3.99")))
    assert str(caught.value) == (
        "environment probe: a==1 b==2 needs Python 3.98 or 3.99 with the modules venv and ensurepip; none is on "
        f"PATH or below ~/.pyenv/versions, and edgeq runs on {RUNNING}. Install one, e.g. with `pyenv install 3.98`, "
        "and run edgeq again."
    )
    assert not Cache().root.exists()


# --- a real one -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tflite_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the environment of tflite-runtime 2.14.0 once, in a cache of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEQ_CACHE_DIR", str(tmp_path_factory.mktemp("environments")))
        try:
            yield interpreter(TFLITE)
        except ToolMissing as error:
            pytest.skip(str(error))


@pytest.fixture
def tflite_runtime(tflite_python: Path) -> Iterator[Worker]:
    with tflite_worker(tflite_python, "tflite-runtime") as worker:
        yield worker


@pytest.mark.tflite
def test_the_environment_of_tflite_runtime_has_its_pins(tflite_runtime: Worker, tflite_python: Path) -> None:
    version = tflite_runtime.call(do="version")
    assert (version["version"], version["numpy"]) == ("2.14.0", "1.26.4") and version["python"].startswith("3.11.")


@pytest.mark.tflite
@pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="no ai_edge_litert")
def test_tflite_runtime_and_litert_give_the_same_bytes(tflite_runtime: Worker, tmp_path: Path) -> None:
    path, inputs = write_adder(tmp_path / "adder.tflite", (8, 4)), make_inputs(5, 1, 8)
    totals = []
    with tflite_worker(sys.executable, "litert") as litert:
        for worker in (tflite_runtime, litert):
            assert set(worker.call(do="load", path=str(path), threads=1)["signatures"]) == {"seq_4", "seq_8"}
            totals.append(
                unpack_reply(worker.call(do="run_many", signature="seq_8", inputs=inputs)["outputs"]["total"])
            )
    assert abs(totals[0] - sum_of(inputs)).max() <= 1
    assert totals[0].shape == (5, 1, 8) and totals[0].tobytes() == totals[1].tobytes()
