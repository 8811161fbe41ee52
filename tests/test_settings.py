"""Settings in a model's files are honoured, refused or listed by name; none is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend import settings
from edgeq.frontend.known_settings import ENCODER, IMAGES, MODEL, TABLES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "model-settings.md"


def directory(folder: Path, encoder: dict[str, object] | None = None, **files: object) -> Path:
    """Write a directory that holds settings alone; a file's name is written with _ for . and __ for /."""
    entries = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    whole = {"modules.json": entries, ENCODER: {"max_seq_length": 32, "do_lower_case": False} | (encoder or {})}
    for name, content in (whole | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_usual_settings_are_neither_refused_nor_listed(tmp_path: Path) -> None:
    usual = {
        MODEL: {"__version__": {"pytorch": "2"}, "prompts": {"query": "q: "}, "similarity_fn_name": "cosine"},
        "tokenizer_config.json": {"model_max_length": 32, "padding_side": "right", "tokenizer_class": "BertTokenizer"},
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 8, "out_features": 4, "use_residual": False},
    }
    more = {"unpad_inputs": None, "query_expansion": None, "transformer_task": "feature-extraction"}
    assert settings.read(directory(tmp_path, more, **usual)) == settings.Settings()


def test_lengths_are_read(tmp_path: Path) -> None:
    found = settings.read(directory(tmp_path / "tasks", {"query_length": 8, "document_length": 16}))
    assert (found.max_length, found.query_length, found.document_length) == (None, 8, 16)
    found.require_within(16, "model")
    with pytest.raises(Unsupported, match="document_length 16, and the model takes at most 12 tokens"):
        found.require_within(12, "model")
    both = {"text": {"max_length": 9, "truncation": True}, "common": {"max_length": 7}}
    found = settings.read(directory(tmp_path / "all", {"processing_kwargs": both, "query_length": 8}))
    assert (found.max_length, found.query_length) == (7, None)
    assert found.unused == (f"{ENCODER}: query_length (processing_kwargs has max_length)",)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"query_expansion": {"strategy": "fixed", "length": 32}}, "query_expansion is .* mask tokens"),
        ({"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ({"tokenizer_name_or_path": "other"}, "tokenizer_name_or_path is 'other'.*outside of the directory"),
        ({"max_lenght": 8}, "max_lenght is no setting"),
        ({"processing_kwargs": {"text": {"truncation": False}}}, "processing_kwargs.text.truncation is False"),
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "text.add_special_tokens is False"),
        ({"processing_kwargs": {"common": {"stride": 2}}}, "common.stride is 2"),
        ({"processing_kwargs": {"text": {"return_attention_mask": False}}}, "return_attention_mask is False"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, encoder: dict[str, object], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        settings.read(directory(tmp_path, encoder))


@pytest.mark.parametrize("value", [0, -1, "16", True, 1.5])
def test_a_length_that_is_none_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError, match="query_length is .*; a positive number of tokens is needed"):
        settings.read(directory(tmp_path, {"query_length": value}))


def test_what_nothing_reads_is_listed(tmp_path: Path) -> None:
    files = {
        MODEL: {"prompts": {}, "flavour": "mint"},
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode": "mean", "shape": "round"},
        "2_Dense/config.json": {"in_features": 8, "gain": 2.0},
        "tokenizer_config.json": {"do_lower_case": True, "do_shuffle": True},
    }
    more = {"unpad_inputs": True, "processing_kwargs": {"text": {"padding": "max_length"}, "audio": {"rate": 1}}}
    assert settings.read(directory(tmp_path, more, **files)).unused == (
        f"1_Pooling/config.json: shape{settings.UNKNOWN}",
        f"2_Dense/config.json: gain{settings.UNKNOWN}",
        f"{MODEL}: flavour{settings.UNKNOWN}",
        f"{ENCODER}: processing_kwargs.audio",
        f"{ENCODER}: processing_kwargs.text.padding",
        f"{ENCODER}: unpad_inputs",
        f"tokenizer_config.json: do_shuffle{settings.UNKNOWN}",
    )


def test_settings_of_images_go_into_the_processors_file(tmp_path: Path) -> None:
    given = directory(tmp_path, {"processing_kwargs": {"image": {"do_resize": False}, "text": {"stride": 1}}})
    with pytest.raises(Unsupported, match="do_resize, which changes how images are prepared"):
        settings.read(given, takes_images=True)


def test_an_image_processors_settings_are_read(tmp_path: Path) -> None:
    given = {"do_resize": True, "size": {"height": 8, "width": 8}, "do_pad": False, "sharpen": 2}
    unused = settings.read(directory(tmp_path, **{IMAGES: given}), takes_images=True).unused
    assert unused == (f"{IMAGES}: sharpen{settings.UNKNOWN}",)
    with pytest.raises(Unsupported, match="crop_pct is 0.9: it is a step that edgeq lacks"):
        settings.read(directory(tmp_path, **{IMAGES: {"crop_pct": 0.9}}), takes_images=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (ENCODER, {"do_lower_case": True}),
        (ENCODER, {"tokenizer_args": {"do_lower_case": True}}),
        (MODEL, {"truncate_dim": 4}),
        ("2_Dense/config.json", {"use_residual": True}),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}),
    ],
)
def test_an_onnx_file_is_refused_with_what_its_loader_would_apply(
    tmp_path: Path, name: str, content: dict[str, object]
) -> None:
    given = directory(tmp_path, **{name: content})
    settings.read(given)
    with pytest.raises(Unsupported, match=f"{next(iter(content))} is .*an ONNX file is not loaded by it"):
        settings.read(given, is_onnx=True)


def test_the_page_shows_every_setting() -> None:
    shown: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            file = shown.setdefault(line.removeprefix("## ").replace("`", ""), {})
        elif line.startswith("| `"):
            names, verdict, _ = (cell.strip() for cell in line.strip("|").split("|"))
            file |= {name.strip("` "): verdict for name in names.split(",")}
    known = {file: {name: setting.verdict for name, setting in table.items()} for file, table in TABLES.items()}
    assert {file: table for file, table in shown.items() if table} == known
