"""A folder of `edgeq/` is a stage, in the order of the data, and imports only folders above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Top to bottom: each may import what stands above it. `docs/contributing/layout.md` says what each is for.
ORDER = (
    "errors", "records", "version", "system", "targets", "data", "graph", "passes", "frontend", "calibration",
    "quantization", "backends", "evaluation", "codecs", "bundle",
    "vectors", "pipeline", "analysis", "devices", "reports", "release", "cli",
    "__main__",
)  # fmt: skip
MOST_ENTRIES = 28
MOST_LINES = 350


def modules(root: Path) -> dict[str, Path]:
    """Map dotted names to the files below a package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root.parent).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> Iterator[tuple[str, int, str]]:
    """Give each import of one module of a package by another: who imports, in which line, what."""
    known = modules(root)
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [name if name in known else node.module for name in names]
            else:
                continue
            for name in dict.fromkeys(imported):
                if name in known and name != module:
                    yield module, node.lineno, name


def against_the_order(root: Path, order: tuple[str, ...]) -> list[str]:
    """List the imports of what stands further down, or of the package's own front, each with its file and line."""
    known, wrong = modules(root), []
    for module, line, imported in imports(root):
        if module == root.name:
            continue  # the package's front loads public names when they are first used
        own, other = (name.split(".")[1] if "." in name else "__init__" for name in (module, imported))
        where = f"{known[module].relative_to(root.parent)}:{line}"
        if other not in order:
            wrong.append(f"{where}: {own} imports {imported}, which stands nowhere in the order")
        elif own not in order or order.index(other) > order.index(own):
            wrong.append(f"{where}: {own} imports {imported}, which stands below it")
    return wrong


def circles(root: Path) -> list[str]:
    """List groups of files of which each reaches the others by imports."""
    edges: dict[str, set[str]] = {name: set() for name in modules(root)}
    for module, _, imported in imports(root):
        edges[module].add(imported)
    reach = {}
    for name in edges:
        seen, waiting = set(), [name]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        reach[name] = seen
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in edges if name in reach[name]
    }
    return sorted(" and ".join(sorted(group)) for group in groups)


def test_folders_import_only_folders_above_them() -> None:
    assert against_the_order(REPOSITORY / "edgeq", ORDER) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(REPOSITORY / "edgeq") == []


def test_everything_at_the_top_stands_in_the_order() -> None:
    entries = [path for path in (REPOSITORY / "edgeq").iterdir() if path.name not in ("__pycache__", "_data")]
    names = {path.name for path in entries if path.is_file() or any(path.rglob("*.py"))}
    assert {name.removesuffix(".py") for name in names} - {"__init__", "py.typed"} == set(ORDER)
    assert len(names) <= MOST_ENTRIES


def test_modules_are_short() -> None:
    lengths = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(REPOSITORY / "edgeq").items()
    }
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Make a package of two folders and a front, in which all is in order."""
    root = tmp_path / "house"
    for name, text in {
        "__init__.py": "from house.roof.tile import tile\n",
        "ground/__init__.py": "",
        "ground/stone.py": "import os\n",
        "ground/sand.py": "from house.ground import stone\n",
        "roof/__init__.py": "",
        "roof/tile.py": "import house.ground.stone\n\ndef tile():\n    from house.ground.sand import grain\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_house_in_order_is_accepted(house: Path) -> None:
    assert against_the_order(house, ("ground", "roof")) == []
    assert circles(house) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\nfrom house.roof.tile import tile\n", "2: ground imports house.roof.tile, which stands below it"),
        ("def late():\n    import house.roof.tile\n", "2: ground imports house.roof.tile, which stands below it"),
        ("from house.roof import tile\n", "1: ground imports house.roof.tile, which stands below it"),
        ("import house\n", "1: ground imports house, which stands nowhere in the order"),
    ],
)
def test_an_import_against_the_order_is_named_with_its_line(house: Path, text: str, found: str) -> None:
    (house / "ground" / "stone.py").write_text(text)
    assert f"house/ground/stone.py:{found}" in against_the_order(house, ("ground", "roof"))


def test_a_folder_outside_the_order_is_named(house: Path) -> None:
    assert any("roof imports house.ground.stone" in line for line in against_the_order(house, ("ground",)))


def test_a_circle_is_named(house: Path) -> None:
    (house / "ground" / "stone.py").write_text("from house.ground.sand import grain\n")
    assert circles(house) == ["house.ground.sand and house.ground.stone"]
