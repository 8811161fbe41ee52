"""A located model crosses to the child process that runs torch without losing a field."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from edgeq.errors import EdgeqError
from edgeq.frontend.locate import Located, from_json, to_json
from edgeq.frontend.onnx.find import OnnxFile
from edgeq.records import FileRef
from edgeq.system.stage import InputFile

REF = FileRef(path="/m/config.json", sha256="0" * 64, size_bytes=2)
FILES = (InputFile(name="config.json", file=REF),)
FILE = OnnxFile(Path("/m/model.onnx"), Path("/m/tokenizer.json"), Path("/m"), 64, True, "module", "cd", FILES, FILES)
FULL = Located("name", Path("/models/name"), True, "mean", "ab", FILE, 16, "text", FILES, {"modeling.py": "0" * 64})


def handed_over(located: Located) -> Located:
    return from_json(json.loads(json.dumps(to_json(located))))


def test_every_field_survives() -> None:
    plain = Located("name", Path("name"), False, None, "ab")
    assert handed_over(plain) == plain
    assert handed_over(FULL) == FULL
    assert handed_over(replace(FULL, onnx=replace(FILE, config_dir=None, normalize=None))).onnx is not None


def test_the_example_differs_from_every_default() -> None:
    for item in (FULL, FILE):
        for field in fields(item):
            assert getattr(item, field.name) != field.default


@pytest.mark.parametrize("field", [field.name for field in fields(Located)])
def test_a_missing_key_is_an_error(field: str) -> None:
    handed = to_json(FULL)
    del handed[field]
    with pytest.raises(EdgeqError, match=f"handed over.*{field}|{field}"):
        from_json(handed)


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(EdgeqError, match="prefix"):
        from_json(to_json(FULL) | {"prefix": "query: "})
    nested = to_json(FULL)
    nested["onnx"] = {**nested["onnx"], "prefix": "query: "}  # type: ignore[dict-item]
    with pytest.raises(EdgeqError, match="handed over"):
        from_json(nested)
