"""The pages of docs/: the site builds, the commands are those of the code, and the examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeq
from edgeq.records import Gate, RunsOn, Target

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
DECISIONS = [page for page in PAGES if page.parent.name == "decisions" and page.stem != "index"]
WAYS_IN = DOCS / "guides" / "ways-in.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]*)(#[^)]+)?\)")
IN_REPOSITORY = re.compile(r"`((?:edgeq|tools|tests|targets|docs)/[^` ]*)`")


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


def named(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Give what a page's headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"#" + re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def column(text: str, header: str) -> list[str]:
    """Give the names in code in the first column of the tables whose head begins so."""
    (table,) = re.findall(rf"^\| {re.escape(header)} \|.*\n\|[-|: ]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    return [name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_reach_a_page_and_a_heading(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named_files = IN_REPOSITORY.findall(page.read_text(encoding="utf-8"))
    patterns = [name for name in named_files if not re.search(r"NAME|KIND|VERB|_X\b", name)]
    assert [name for name in patterns if not any(REPOSITORY.glob(name.rstrip("/")))] == []


def test_the_layout_lists_the_folders_in_the_order_of_the_imports() -> None:
    import test_layout

    package = REPOSITORY / "edgeq"
    listed = [name.rstrip("/") for name in column(read("contributing/layout.md"), "folder") if name.endswith("/")]
    assert sorted(listed) == sorted(path.parent.name for path in package.glob("*/__init__.py"))
    assert listed == [name for name in test_layout.ORDER if name in listed]


def test_the_layout_lists_the_files_at_the_top() -> None:
    files = column(read("contributing/layout.md"), "file")
    assert sorted(files) == sorted(path.name for path in (REPOSITORY / "edgeq").iterdir() if path.is_file())


@pytest.mark.parametrize("page", sorted((DOCS / "contributing").glob("add-a*.md")), ids=named)
def test_an_add_page_ends_with_the_test_that_fails(page: Path) -> None:
    *_, last = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert last.startswith("The test that fails until you are done\n")
    assert re.search(r"`tests/test_\w+\.py`", last)


@pytest.mark.parametrize(
    "page", [path for path in PAGES if path.parent.name == "decisions" and path.stem != "index"], ids=named
)
def test_a_decision_has_four_parts(page: Path) -> None:
    _, *decisions = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert decisions
    assert f"]({page.name})" in read("decisions/index.md")
    for decision in decisions:
        title, _, body = decision.partition("\n")
        parts = re.split(r"^- \*\*(\w+)\.\*\* ", body, flags=re.MULTILINE)
        assert parts[1::2] == ["Context", "Decision", "Evidence", "Code"], title
        assert re.search(r"\d{4}-\d\d-\d\d", parts[6]), title
        assert IN_REPOSITORY.search(parts[8]), title


def test_the_target_file_page_has_every_key() -> None:
    page = read("reference/target-file.md")
    names = ("", *re.findall(r"^## `(.+)`$", page, flags=re.MULTILINE))
    parts = dict(zip(names, re.split(r"^## ", page, flags=re.MULTILINE), strict=True))
    assert {*column(parts[""], "key"), "runtime", "runs_on", "gate"} == set(Target.model_fields)
    assert set(column(parts["[runs_on]"], "key")) == set(RunsOn.model_fields)
    assert set(column(parts["[gate]"], "key")) == set(Gate.model_fields)


def test_the_python_page_has_every_public_name() -> None:
    page = read("reference/python-api.md")
    assert [name for name in edgeq.__all__ if f"edgeq.{name}" not in page] == []


def test_the_first_page_has_every_verb() -> None:
    verbs = re.findall(r"^## `edgeq (\w+)`", read("reference/cli.md"), flags=re.MULTILINE)
    assert len(verbs) > 10
    assert sorted(set(re.findall(r"^\| `edgeq (\w+)", read("index.md"), flags=re.MULTILINE))) == sorted(verbs)


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra `docs`")
    # No --quiet: it silences the warnings that --strict counts.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "keep-failed" in (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")


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
