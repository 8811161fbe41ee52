"""Exporting in a fork of a process that has torch imported is exporting in a process of its own, but sooner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import export_server  # noqa: E402
import tiny_source  # noqa: E402

from edgeq.frontend import locate  # noqa: E402
from edgeq.frontend.torch import convert  # noqa: E402

REAL_RUN = subprocess.Popen  # what a new process is started with here: `subprocess.run` may be the server's


def command(model: Path, out: Path) -> list[str]:
    out.mkdir()
    located = locate.locate(str(model))
    if model.name == "broken":
        (model / "config.json").write_text('{"model_type": "none"}', encoding="utf-8")
    request = json.dumps({"located": locate.to_json(located), "out_dir": str(out), "hidden_state": True})
    return [sys.executable, "-m", convert.__name__, request]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fork_writes_the_bytes_of_a_new_process(exporting: export_server.Server, tmp_path: Path) -> None:
    model = tiny_source.sentence_transformer(tmp_path / "model", dense=True)
    broken = tmp_path / "broken"
    tiny_source.sentence_transformer(broken)
    run = export_server.forked(exporting, tmp_path, lambda *_, **__: pytest.fail("this is the server's"))
    for place, code in ((model, 0), (broken, None)):
        with REAL_RUN(command(place, tmp_path / f"{place.name}-new"), stdout=-1, stderr=-1, text=True) as new:
            said, _ = new.communicate()
        for name in ("first", "second"):  # a fork leaves nothing behind for the next one
            done = run(command(place, tmp_path / f"{place.name}-{name}"), capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (new.returncode, said)
            assert contents(tmp_path / f"{place.name}-{name}") == contents(tmp_path / f"{place.name}-new")
        assert (new.returncode == 0) == (code == 0)
    assert convert.RAW in contents(tmp_path / "model-new")


def test_what_lies_elsewhere_gets_a_new_process(tmp_path: Path) -> None:
    asked = []
    run = export_server.forked(export_server.Server(), tmp_path / "here", lambda *given, **_: asked.append(given))
    for words in (
        ["-m", "edgeq", "{}"],
        ["-m", convert.__name__, json.dumps({"located": {"directory": str(tmp_path)}})],
    ):
        run([sys.executable, *words], capture_output=True)
    assert len(asked) == 2


def test_a_fork_that_hangs_is_killed_and_a_new_process_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = REAL_RUN([sys.executable, "-c", "import time; time.sleep(60)"])
    assert export_server._ended(child.pid, 0.1) == export_server.HUNG
    child.wait()  # it was waited for already: gives no code of its own
    server, asked = export_server.Server(), []
    hung = subprocess.CompletedProcess([], export_server.HUNG, "", "")
    monkeypatch.setattr(server, "call", lambda arguments: hung)
    run = export_server.forked(server, tmp_path, lambda *given, **_: asked.append(given))
    request = json.dumps({"located": {"directory": str(tmp_path / "model")}})
    run([sys.executable, "-m", convert.__name__, request], capture_output=True)
    assert len(asked) == 1
