from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import edgeq

REPOSITORY = Path(__file__).resolve().parent.parent


def test_public_names_are_sorted_and_there() -> None:
    assert edgeq.__all__ == sorted(edgeq.__all__)
    for name in edgeq.__all__:
        assert getattr(edgeq, name) is not None
    assert dir(edgeq) == edgeq.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        edgeq.no_such_name  # noqa: B018


def test_every_error_has_an_exit_code_of_its_own() -> None:
    kinds = edgeq.EdgeqError.__subclasses__()
    assert sorted(kind.exit_code for kind in kinds) == list(range(2, 12))
    assert edgeq.EdgeqError.exit_code == 1


@pytest.mark.parametrize("module", ["edgeq", "edgeq.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = ("numpy", "onnx", "onnxruntime", "pydantic", "tokenizers", "torch", "transformers")
    code = f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


@pytest.mark.parametrize("module", ["edgeq.pipeline.export", "edgeq.pipeline.check", "edgeq.bundle.load"])
def test_texts_need_neither_pillow_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'PIL', 'torch', 'transformers'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


def test_the_support_table_is_true() -> None:
    command = [sys.executable, REPOSITORY / "tools" / "support_table", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run tools/support_table"


@pytest.mark.parametrize("verb", ["export", "validate", "embed"])
def test_help_does_not_speak_of_exceptions(verb: str) -> None:
    shown = subprocess.run([sys.executable, "-m", "edgeq", verb, "--help"], capture_output=True, text=True, check=True)
    assert "Raises" not in shown.stdout
