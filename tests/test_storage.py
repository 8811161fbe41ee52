from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq.system import files

HOLD = """
import sys, time
from pathlib import Path
from edgeq.system.files import replacing_dir
with replacing_dir(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("x")
    print(partial, flush=True)
    time.sleep(60)
"""


def holder(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that is half-way through writing a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def stop(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def write(path: Path, text: str) -> None:
    with files.replacing_dir(path) as partial:
        (partial / "file").write_text(text, encoding="utf-8")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process, partial = holder(tmp_path / "out")
    stop(process)
    assert (partial / "half").is_file()
    write(tmp_path / "out", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    process, partial = holder(tmp_path / "out")
    try:
        write(tmp_path / "out", "whole")
        assert (partial / "half").is_file()
    finally:
        stop(process)


def test_a_folder_that_stepped_aside_for_a_killed_process_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.abc.replaced"
    (aside / "out").mkdir(parents=True)
    (aside / "out" / "file").write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError, match="stop"), files.replacing_dir(tmp_path / "out"):
        assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "old"
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_of_like_names_are_no_leftovers(tmp_path: Path) -> None:
    for name in (".out.mine", ".out", ".other.x.partial", ".out.x.partial.txt"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.file.partial").write_text("a file", encoding="utf-8")
    before = {path.name for path in tmp_path.iterdir()}
    write(tmp_path / "out", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {*before, "out"}


def test_two_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgeq.system.files import replacing_dir\n"
        "for _ in range(60):\n"
        "    with replacing_dir(Path(sys.argv[1])) as partial:\n"
        "        [(partial / str(n)).write_text(sys.argv[2]) for n in range(5)]\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out"), each]) for each in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len({path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
