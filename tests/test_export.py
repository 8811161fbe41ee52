"""Export every kind of source that a user may have, through torch, and compare with sentence-transformers itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeq.errors import ConfigError
from edgeq.frontend import locate

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import tiny_source  # noqa: E402

from edgeq.data.sessions import embed_batches  # noqa: E402
from edgeq.data.tokenizer import Tokenizer  # noqa: E402
from edgeq.data.tokens import batches  # noqa: E402
from edgeq.frontend.float_model import CONFIG, MODEL, write_float_model  # noqa: E402
from edgeq.graph import dialect  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402


def embeddings(folder: Path, limit: int, texts: list[str]) -> np.ndarray:
    tokens = Tokenizer.from_file(folder / CONFIG / "tokenizer.json", limit).encode(texts)
    return embed_batches(FloatSession.of(folder / MODEL), batches(tokens), len(texts))


def exported(directory: Path, out: Path, pooling: str | None = None, hidden_state: bool = True):  # noqa: ANN201
    out.mkdir()
    return write_float_model(locate.locate(str(directory), pooling), out, hidden_state)


@pytest.mark.parametrize("pooling", locate.POOLING_MODES)
def test_every_pooling_mode_gives_the_vectors_of_sentence_transformers(pooling: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    directory = tiny_source.sentence_transformer(tmp_path / "model", pooling)
    record, model = exported(directory, tmp_path / "out")
    assert f"Pooling:{pooling}" in record.modules
    assert model.max_abs_error < 1e-5
    texts = tiny_source.texts(12)
    expected = SentenceTransformer(str(directory), device="cpu").encode(texts, batch_size=5)
    assert np.abs(embeddings(tmp_path / "out", record.max_sequence, texts) - expected).max() < 1e-5


def test_dense_and_prompts_travel(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    directory = tiny_source.sentence_transformer(
        tmp_path / "model", dense=True, normalize=False, prompts={"query": "the "}
    )
    record, model = exported(directory, tmp_path / "out")
    assert record.dim == model.dim == 32
    assert record.prompts == {"query": "the ", "document": ""}
    assert (tmp_path / "out" / CONFIG / "2_Dense" / "model.safetensors").is_file()
    assert not list((tmp_path / "out" / CONFIG).glob("*.safetensors"))
    texts = tiny_source.texts(6)
    expected = SentenceTransformer(str(directory), device="cpu").encode(texts)
    assert np.abs(embeddings(tmp_path / "out", record.max_sequence, texts) - expected).max() < 1e-5


def test_a_plain_directory_needs_a_pooling_mode(tmp_path: Path) -> None:
    directory = tiny_source.body(tmp_path / "plain")
    with pytest.raises(ConfigError, match="--pooling"):
        locate.locate(str(directory))
    record, _ = exported(directory, tmp_path / "out", "cls")
    assert record.kind == "transformers" and "Pooling:cls" in record.modules


def test_the_graph_is_in_the_dialect_with_symbolic_axes(tmp_path: Path) -> None:
    directory = tiny_source.sentence_transformer(tmp_path / "model")
    _, model = exported(directory, tmp_path / "out", hidden_state=False)
    graph = onnx.load(tmp_path / "out" / MODEL)
    dialect.verify(graph, "model")
    assert model.outputs == ("sentence_embedding",)
    done = {report.name: report.rewrites for report in model.passes}
    assert done["finite_mask"] == 1 and done["pool_by_matmul"] == 1 and done["fold_attention_scale"] == 2
    assert all(report.max_abs_error < 1e-5 for report in model.passes)
    operators = {node.op_type for node in graph.graph.node}
    assert {"LayerNormalization", "Gelu"} <= operators
    assert not operators & {"GatherND", "Where", "Range", "Expand"}


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    directory = tiny_source.sentence_transformer(tmp_path / "model")
    for name in ("one", "two"):
        exported(directory, tmp_path / name)
    assert (tmp_path / "one" / MODEL).read_bytes() == (tmp_path / "two" / MODEL).read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.rglob("*.safetensors")], "no weights"),
        (lambda folder: cut(folder / "model.safetensors"), "cut off"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_damaged_directory_is_refused(damage, message: str, tmp_path: Path) -> None:  # noqa: ANN001
    directory = tiny_source.body(tmp_path / "plain")
    damage(directory)
    with pytest.raises(ConfigError, match=message):
        locate.locate(str(directory), "mean")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_an_unknown_pooling_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weightedmean"):
        locate.locate(str(tmp_path), "average")


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="all-MiniLM-L6-v2"):
        locate.locate("no/such-model")
