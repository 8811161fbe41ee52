"""Temporary folders are removed, those of killed processes by the next that makes one, and nobody else's ever."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import edgeq
from edgeq.system import files
from edgeq.system.cache import Cache

HOLD = """
import sys, time
from edgeq.system.cache import Cache
from edgeq.system.files import work_dir
cache = Cache.temporary()
(cache.root / "half").write_text("x")
with work_dir() as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "half").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""
MAKERS = {"TemporaryDirectory", "mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty temporary directory, in child processes, too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder() -> subprocess.Popen[str]:
    """Start a process that holds a temporary cache and a temporary folder, with something in each."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def held(temporary: Path) -> set[str]:
    return {path.name for path in temporary.iterdir()}


def test_folders_of_a_killed_process_go_with_the_next_one(temporary: Path) -> None:
    process = holder()
    left = held(temporary)
    kill(process)
    assert held(temporary) == left and len(left) == 2
    with files.work_dir() as folder:
        assert held(temporary) == {folder.parent.name} and not held(folder)
    assert held(temporary) == set()


def test_folders_of_a_living_process_stay(temporary: Path) -> None:
    process = holder()
    try:
        left = held(temporary)
        cache = Cache.temporary()
        with files.work_dir(), files.work_dir():
            assert len(held(temporary)) == 5 and left < held(temporary)
        assert cache.root.is_dir()
        cache.close()
        assert held(temporary) == left
    finally:
        kill(process)


def test_a_fork_removes_nothing_of_its_parents(temporary: Path) -> None:
    code = (
        "import os, sys\nfrom edgeq.system import files\nmade = files.TemporaryFolder(files.PREFIX)\n"
        "child = os.fork()\n"
        "if child == 0:\n    sys.exit(0)\n"
        "os.waitpid(child, 0)\nassert made.path.is_dir()\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert held(temporary) == set()


def test_what_is_not_known_to_be_a_dead_process_s_stays(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    for folder in (temporary / "edgeq-mine", temporary / "other-x", elsewhere):
        (folder / "work").mkdir(parents=True)
    for folder in (temporary / "other-x", elsewhere):  # not by the name, and behind a link
        (folder / ".edgeq-owner").touch()
    (temporary / "edgeq-link").symlink_to(elsewhere)
    (temporary / "edgeq-file").write_text("a file", encoding="utf-8")
    (temporary / "edgeq-marked").mkdir()
    (temporary / "edgeq-marked" / ".edgeq-owner").symlink_to(elsewhere / ".edgeq-owner")
    (temporary / "edgeq-pipe").mkdir()
    os.mkfifo(temporary / "edgeq-pipe" / ".edgeq-owner")
    before = held(temporary)
    with files.work_dir():
        pass
    assert held(temporary) == before and (elsewhere / "work").is_dir()


def test_another_user_s_folder_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = holder()
    kill(process)
    left = held(temporary)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    files.sweep_temporary(temporary)
    assert held(temporary) == left
    monkeypatch.undo()
    files.sweep_temporary(temporary)
    assert held(temporary) == set()


def test_a_link_inside_a_dead_folder_is_removed_and_not_followed(temporary: Path) -> None:
    process = holder()
    kill(process)
    kept = temporary / "kept"
    kept.mkdir()
    (kept / "file").touch()
    for folder in temporary.glob("edgeq-*"):
        (folder / "work" / "link").symlink_to(kept)
    files.sweep_temporary(temporary)
    assert held(temporary) == {"kept"} and (kept / "file").is_file()


def test_one_place_makes_temporary_folders() -> None:
    package = Path(edgeq.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or "dir" in {word.arg for word in node.keywords}:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in MAKERS:
                found.append(f"{path.relative_to(package)}:{node.lineno}: {name}")
    assert found == [], "edgeq.system.files.work_dir makes folders that a later run removes if this one is killed"
