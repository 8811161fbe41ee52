"""TensorFlow, which wrote none of it, reads edgeq's .tflite files: same tensors, same operators, same vectors."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

import tensorflow_reader
from ai_edge_litert import schema_py_generated as schema
from tensorflow_reader import Reading, compared
from tiny_integer import BUCKETS, TOKENS, cosines, is_added, make_model, meant, mirror, with_wrong_scale

from edgeq.backends.tflite import kernels
from edgeq.backends.tflite.emitter import Settings
from edgeq.backends.tflite.lowering import lower_model
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import batches
from edgeq.records import QdqModel

pytestmark = [pytest.mark.tensorflow, pytest.mark.tflite]

TARGETS = Settings(32, "cast", "roots")  # of the targets for LiteRT
WIDE = Settings(64, "cast", "roots")


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A QDQ model, its file for the targets, and one with biases of 64 bits."""

    model: QdqModel
    path: Path
    wide_path: Path


def lower(model: QdqModel, folder: Path) -> Lowered:
    found = Lowered(model, folder / "model.tflite", folder / "wide.tflite")
    for path, settings in ((found.path, TARGETS), (found.wide_path, WIDE)):
        path.write_bytes(lower_model(ir.load(model.file.path), BUCKETS, settings))
    return found


@pytest.fixture(scope="module", params=["w8a8-int", "w8a16-int"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    folder = tmp_path_factory.mktemp("tensorflow")
    return lower(make_model(request.param, folder), folder)


@pytest.fixture(scope="module")
def reading(lowered: Lowered) -> Reading:
    return tensorflow_reader.read(lowered.path)


def embed(path: Path, runtime: str) -> Embeddings:
    return embed_batches(tensorflow_reader.session(path, runtime, BUCKETS), batches(TOKENS), len(TOKENS.ids))


def wrong_tensors(reading: Reading, model: QdqModel) -> list[str]:
    assert sum(len(tensor.scale) > 0 and not is_added(tensor.name) for tensor in reading.tensors) > 120
    return [name for name, is_right in compared(reading.tensors, meant(model)).items() if not is_right]


def test_it_reads_the_dtypes_scales_and_zero_points_that_the_qdq_model_means(
    lowered: Lowered, reading: Reading
) -> None:
    assert reading.version == "2.21.0"
    assert wrong_tensors(reading, lowered.model) == []


def test_a_wrong_scale_zero_point_or_dtype_shows(lowered: Lowered, tmp_path: Path) -> None:
    read = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(lowered.path.read_bytes(), 0))
    one, other, third = (
        next(item for item in graph.tensors if item.name == b"layer.1.gelu") for graph in read.subgraphs
    )
    wrong = copy.copy(one.quantization)  # signatures share it
    wrong.scale = np.nextafter(wrong.scale, np.float32(1))
    one.quantization = wrong
    wrong = copy.copy(other.quantization)
    wrong.zeroPoint = wrong.zeroPoint + 1
    other.quantization = wrong
    third.type = schema.TensorType.UINT8
    path = tmp_path / "wrong.tflite"
    path.write_bytes(packed(read))
    names = [f"seq_{length}: layer.1.gelu" for length in (48, 16, 8)]
    assert wrong_tensors(tensorflow_reader.read(path), lowered.model) == names


def packed(model: schema.ModelT) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_its_analyser_finds_every_operator_and_signature(lowered: Lowered, reading: Reading) -> None:
    wanted: dict[str, list[str]] = {}
    for operator in kernels.read(lowered.path.read_bytes()).operators:
        wanted.setdefault(operator.signature, []).append(operator.name)
    assert reading.operators == wanted
    assert re.findall(r"^Signature#\d+ key: '(\w+)'$", reading.analysis, re.MULTILINE) == ["seq_48", "seq_16", "seq_8"]


def test_its_kernels_give_litert_s_vectors(lowered: Lowered) -> None:
    here, there = embed(lowered.path, "litert"), embed(lowered.path, "tensorflow")
    assert cosines(here, there).min() > 0.999


def test_its_reference_kernels_give_litert_s_vectors(lowered: Lowered) -> None:
    found = embed(lowered.path, "tensorflow-reference")
    is_wide = lowered.model.scheme.name == "w8a16-int"
    near = cosines(embed(lowered.path, "litert-builtin"), found)
    assert near.min() > (0.9999 if is_wide else 0.99)
    assert near.mean() > 0.9995
    # XNNPACK rounds 8-bit products another way, and so does ONNX Runtime: one text of the forty is far off, at 0.99.
    for other in (embed(lowered.path, "litert"), mirror(lowered.model)):
        assert cosines(other, found).mean() > (0.9995 if is_wide else 0.999)


def test_its_reference_kernels_read_biases_of_32_bits_as_those_of_64(lowered: Lowered) -> None:
    narrow, wide = (embed(path, "tensorflow-reference") for path in (lowered.path, lowered.wide_path))
    np.testing.assert_array_equal(narrow, wide)


def test_a_wrong_scale_shows_in_its_vectors(lowered: Lowered, tmp_path: Path) -> None:
    wrong = lower(with_wrong_scale(lowered.model, "layer.1.gelu", 1 / 8, tmp_path / "wrong.onnx"), tmp_path)
    for path, runtime in ((wrong.path, "tensorflow"), (wrong.path, "tensorflow-reference")):
        assert cosines(mirror(lowered.model), embed(path, runtime)).mean() < 0.99
