"""The options of an export: each is reached from both front ends, and stands in the command where it must."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from edgeq.cli.export import export as export_verb
from edgeq.frontend.onnx.find import OnnxOptions
from edgeq.pipeline.api import export as export_function
from edgeq.pipeline.request import COMMAND_OPTIONS, NOT_IN_COMMAND, ExportRequest, command
from edgeq.system.cache import Cache
from edgeq.targets import load_target

TARGET = load_target("x86-64-onnxruntime")
FIELDS = {field.name for kind in (ExportRequest, OnnxOptions) for field in fields(kind)}


def request_of(tmp_path: Path, onnx: OnnxOptions | None = None, **options: object) -> ExportRequest:
    fixed = {"model": "m", "targets": (TARGET,), "out": tmp_path, "cache": Cache(tmp_path)}
    return ExportRequest(**fixed, **options, onnx=onnx or OnnxOptions())  # type: ignore[arg-type]


def test_every_field_is_in_the_command_or_is_said_not_to_be() -> None:
    assert set(COMMAND_OPTIONS) | NOT_IN_COMMAND == FIELDS
    assert not set(COMMAND_OPTIONS) & NOT_IN_COMMAND


@pytest.mark.parametrize(("front_end", "singular"), [(export_verb, True), (export_function, False)])
def test_every_field_is_reached_from_the_front_ends(front_end: object, singular: bool) -> None:
    names = {"targets": "target", "cache": "no_cache"} if singular else {}
    parameters = set(inspect.signature(front_end).parameters)  # type: ignore[arg-type]
    made_by_code = {"onnx", "kind"}  # composed of other options; set where a module is given
    assert {names.get(field, field) for field in FIELDS - made_by_code} <= parameters


def test_a_plain_export_has_a_plain_command(tmp_path: Path) -> None:
    assert command(request_of(tmp_path), "minilm", TARGET) == ("edgeq", "export", "minilm", "--target", TARGET.name)


def test_the_command_has_every_option_that_decides_the_bundle(tmp_path: Path) -> None:
    options = OnnxOptions(tmp_path / "tokenizer.json", 64, False)
    request = request_of(
        tmp_path, options, texts=tmp_path / "a.jsonl", column="body", validation=tmp_path / "b.txt", pooling="mean",
        dim=16, tower="text", samples=99, seed=3, scheme=tmp_path / "s.json", hidden_state=False,
        images=tmp_path / "pictures", evaluation=(tmp_path / "e",), keep_failed=True,
        overwrite=True, dry_run=True, trust_remote_code=True,
    )  # fmt: skip
    assert command(request, "m", TARGET)[5:] == (
        "--texts", "a.jsonl", "--column", "body", "--images", "pictures", "--tower", "text", "--validation", "b.txt",
        "--pooling", "mean", "--dim", "16", "--tokenizer", "tokenizer.json", "--max-sequence", "64",
        "--scheme", "s.json", "--samples", "99", "--seed", "3", 
        "--no-normalize", "--no-hidden-state", "--trust-remote-code",
    )  # fmt: skip
