"""`edgeq inspect` on .tflite files: what is in them, and that damage is a sentence, never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

from ai_edge_litert import schema_py_generated as schema
from tiny_tflite import DIM, VOCABULARY, make_tflite

from edgeq import cli
from edgeq.analysis.inspect.model_file import inspect
from edgeq.analysis.inspect.summary import Port
from edgeq.errors import ConfigError, ToolMissing

pytestmark = pytest.mark.tflite

INPUTS = ("input_ids", "attention_mask")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.tflite"
    path.write_bytes(make_tflite((32, 16)))
    return path


def test_operators_are_counted_by_the_dtypes_they_compute_on(path: Path) -> None:
    anatomy = inspect(path)
    assert (anatomy.file, anatomy.format, anatomy.format_version) == ("model.tflite", "tflite", 3)
    assert anatomy.size_bytes == path.stat().st_size
    assert anatomy.operators == {
        "GATHER": {"int8 x int32": 2},
        "FULLY_CONNECTED": {"int8": 1},
        "MEAN": {"int8": 1},
        "MUL": {"int8": 1},
    }


def test_tensors_that_signatures_share_count_once(path: Path, tmp_path: Path) -> None:
    anatomy = inspect(path)
    weights = VOCABULARY * DIM + 2 + DIM * DIM
    assert {dtype: (group.count, group.elements, group.size_bytes) for dtype, group in anatomy.tensors.items()} == {
        "int8": (3, weights, weights),
        "int32": (2, DIM + 1, 4 * (DIM + 1)),
    }
    assert [(tensor.name, tensor.shape) for tensor in anatomy.largest[:2]] == [
        ("table", (VOCABULARY, DIM)), ("weight", (DIM, DIM)),
    ]  # fmt: skip
    alone = tmp_path / "alone.tflite"
    alone.write_bytes(make_tflite((32,)))
    assert inspect(alone).tensors == anatomy.tensors


def test_signatures_hold_names_shapes_and_what_codes_mean(path: Path) -> None:
    anatomy = inspect(path)
    assert [signature.name for signature in anatomy.signatures] == ["seq_32", "seq_16"]
    for signature, length in zip(anatomy.signatures, (32, 16), strict=True):
        assert signature.inputs == tuple(Port(name=name, dtype="int32", shape=(1, length)) for name in INPUTS)
        (vector,) = signature.outputs
        assert (vector.name, vector.dtype, vector.shape) == ("sentence_embedding", "int8", (1, DIM))
        assert vector.scale == pytest.approx(0.01) and vector.zero_point == 0
        assert signature.operators == 5
    assert (anatomy.inputs, anatomy.outputs) == (anatomy.signatures[0].inputs, anatomy.signatures[0].outputs)


def test_the_verb_prints_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "schema 3" in shown and "signature seq_16: 5 operators" in shown
    assert "output sentence_embedding: int8[1, 24], scale 0.01, zero point 0" in shown
    assert shown.count("input input_ids") == 2


def test_it_is_told_by_its_content_too(path: Path) -> None:
    assert inspect(path.rename(path.with_name("model.bin"))).format == "tflite"


def test_without_the_schema_the_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.delitem(sys.modules, "ai_edge_litert.schema_py_generated")
    with pytest.raises(ToolMissing, match=r'pip install "edgeq\[tflite\]"'):
        inspect(path)


@pytest.mark.parametrize("part", range(20))
def test_a_truncated_file_is_refused_and_named(path: Path, part: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * part // 20])
    with pytest.raises(ConfigError, match=r"model\.tflite: .*a whole model is needed|where a \.tflite model is needed"):
        inspect(path)


def test_a_file_without_its_last_byte_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.tflite"):
        inspect(path)


@pytest.mark.parametrize("content", [b"\0" * 500, b"version https://git-lfs.github.com/spec/v1\n", b"\x08\0\0\0TFL3"])
def test_what_is_no_model_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.tflite"):
        inspect(path)


def test_a_flipped_byte_is_read_or_refused(path: Path) -> None:
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= random.integers(1, 256)
        path.write_bytes(damaged)
        try:
            inspect(path)
        except ConfigError:
            refused += 1
    assert 30 < refused < 200  # weights, and what else nobody can tell from right ones, are most of the file


def changed(path: Path, change: str) -> None:
    import flatbuffers

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
    graph = model.subgraphs[0]
    if change == "index from the end":
        graph.operators[0].inputs = np.array([-3, 0], np.int32)
    elif change == "shape":
        graph.tensors[2].shape = np.array([VOCABULARY + 1, DIM], np.int32)
    elif change == "operator code":
        graph.operators[0].opcodeIndex = 4
    elif change == "signature":
        model.signatureDefs[0].subgraphIndex = 2
    elif change == "name":
        graph.tensors[0].name = b"x" * 5000
    elif change == "scale":
        graph.tensors[2].quantization.scale = np.array([np.nan], np.float32)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(builder.Output())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("index from the end", "tensor -3 of"),
        ("shape", rf"table holds {VOCABULARY * DIM} bytes, int8\[65, 24\] has {(VOCABULARY + 1) * DIM}"),
        ("operator code", "operator code 4 of 4"),
        ("signature", "subgraph 2 of 2"),
        ("name", "a name of 5000 bytes"),
        ("scale", "one that is no number"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(path: Path, change: str, found: str) -> None:
    changed(path, change)
    with pytest.raises(ConfigError, match=found):
        inspect(path)


def test_a_list_longer_than_the_file_is_not_followed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    graphs = schema.Model.GetRootAsModel(data, 0)._tab
    start = graphs.Vector(graphs.Offset(8)) - 4  # the subgraphs' count
    data[start : start + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="a list of 2147483648 entries"):
        inspect(path)
