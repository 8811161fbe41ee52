"""The pages of docs/: the site builds, the commands are those of the code, and the examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
WAYS_IN = REPOSITORY / "docs" / "guides" / "ways-in.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def sections() -> dict[str, str]:
    """Give the Python of each section of the page, by heading; what stands before the first belongs to all."""
    parts = re.split(r"^## (.+)$", WAYS_IN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    start = "".join(BLOCK.findall(parts[0]))
    return {name: start + "".join(BLOCK.findall(text)) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_page_has_four_ways_in() -> None:
    assert list(sections()) == ["A hub id", "A directory", "An ONNX file", "A torch module"]
    assert all("edgeq.export(" in code for code in sections().values())


def test_the_commands_are_those_of_the_code() -> None:
    command = [REPOSITORY / "tools" / "docs", "--check"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float-op" in (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out what the examples name: a directory, an ONNX file, and a hub's cache."""
    pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
    import given_onnx
    import tiny_source

    place = tmp_path_factory.mktemp("examples")
    tiny_source.body(place / "my-encoder")
    given_onnx.legacy(place / "my-encoder", place / "encoder.onnx", 17)
    snapshots = place / "hub" / "models--acme--encoder"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text("0" * 40)
    (snapshots / "snapshots").mkdir()
    tiny_source.sentence_transformer(snapshots / "snapshots" / ("0" * 40))
    return place


@pytest.fixture
def in_examples(examples: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from huggingface_hub import constants

    monkeypatch.chdir(examples)
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(examples / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(examples / "hub"))
    yield examples


@pytest.mark.export
@pytest.mark.parametrize("way", list(sections()))
def test_each_way_in_runs_as_it_is_written(way: str, in_examples: Path) -> None:
    import tiny_source
    from transformers import AutoModel

    names: dict[str, object] = {"texts": tiny_source.texts(200)}
    if way == "A torch module":
        names["module"] = AutoModel.from_pretrained("my-encoder")
    exec(compile(sections()[way], str(WAYS_IN), "exec"), names)  # noqa: S102
