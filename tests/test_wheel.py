"""Build the wheel and use it as somebody who has no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_bundle import make_bundle, make_target

from edgeq.targets import list_targets

pytestmark = pytest.mark.wheel

REPOSITORY = Path(__file__).resolve().parent.parent


def call(command: Sequence[str | Path], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EDGEQ"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, REPOSITORY], out)  # sdist, wheel from it
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def edgeq(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clean")
    call([sys.executable, "-m", "venv", place], place)
    constraints = REPOSITORY / "tools" / "constraints.txt"
    call(
        [
            place / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--constraint",
            constraints,
            wheel,
        ],
        place,
    )
    return place / "bin" / "edgeq"


def test_the_wheel_carries_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    targets = {f"edgeq/_data/targets/{path.name}" for path in (REPOSITORY / "targets").glob("*.toml")}
    texts = {f"edgeq/_data/calibration_data/{name}.jsonl" for name in ("calibration", "validation")}
    assert targets
    assert targets | texts | {"edgeq/py.typed", "edgeq/_data/tools/device/validate.py"} <= names
    templates = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "edgeq").rglob("templates/*.j2")}
    assert len(templates) >= 5 and templates <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "targets/"))]


def test_targets_come_from_the_wheel(edgeq: Path, tmp_path: Path) -> None:
    listed = json.loads(call([edgeq, "targets", "--json"], tmp_path))["targets"]
    assert [item["name"] for item in listed] == [target.name for target in list_targets()]


def test_the_base_package_has_no_torch(edgeq: Path, tmp_path: Path) -> None:
    installed = call([edgeq.with_name("python"), "-m", "pip", "list", "--format", "freeze"], tmp_path)
    assert "onnxruntime==" in installed
    assert "torch" not in installed
    assert "transformers" not in installed


def test_the_base_package_verifies_and_runs_a_bundle(edgeq: Path, tmp_path: Path) -> None:
    runtime = {"intra_op_threads": 0, "graph_optimization": "all"}
    target = make_target(backend="onnxruntime", runtime=runtime)
    path, _ = make_bundle(tmp_path / "out", target=target)
    found = json.loads(call([edgeq, "verify", path, "--json"], tmp_path))
    assert found["golden_texts"] == 32
    (tmp_path / "texts.txt").write_text("how do i\nreset my password\n", encoding="utf-8")
    call([edgeq, "embed", path, "--texts", "texts.txt", "--out", "vectors.npy"], tmp_path)
    assert (tmp_path / "vectors.npy").stat().st_size > 128
    with (path / "onnx" / "model.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    damaged = subprocess.run([edgeq, "verify", path], capture_output=True, text=True, check=False)
    assert damaged.returncode == 7
    assert "onnx/model.onnx" in damaged.stderr
