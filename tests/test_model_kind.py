"""Directories that hold no embedder of one vector a text are refused by name, whatever their modules are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import encoder as tiny_encoder
import onnx
import pytest

from edgeq import cli
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend import locate
from edgeq.frontend.onnx.find import OnnxOptions

_OWN = "sentence_transformers.models"


def written(folder: Path, modules: list[str] | None, **files: object) -> Path:
    """Write the JSON files of a directory: modules of these types, and the content of other files by name."""
    folder.mkdir(parents=True)
    entries = [
        {"idx": row, "name": str(row), "path": "" if row == 0 else f"{row}_{kind.rpartition('.')[2]}", "type": kind}
        for row, kind in enumerate(modules or [])
    ]
    named = {"config": {"model_type": "bert"}} | ({"modules": entries} if modules is not None else {}) | files
    for name, content in named.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def refused(model: Path, options: OnnxOptions | None = None, **given: object) -> str:
    with pytest.raises(Unsupported) as found:
        locate.locate(str(model), options=options or OnnxOptions(), **given)  # type: ignore[arg-type]
    return str(found.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("SparseEncoder", "a weight for every word"),
        ("MultiVectorEncoder", "a vector for each token"),
        ("ColBERT", "a vector for each token"),
        ("SomethingNew", "is not a SentenceTransformer"),
        (None, "is not a SentenceTransformer"),
    ],
)
def test_what_calls_itself_anything_else_is_refused_before_its_modules_are_looked_at(
    kind: str | None, said: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "model", ["no such.Module"], config_sentence_transformers={"model_type": kind})
    message = refused(folder)
    assert f"model_type is {json.dumps(kind)}" in message and said in message and "SentenceTransformer" in message


def test_an_onnx_file_in_such_a_directory_is_refused_by_every_verb_that_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "model", [], config_sentence_transformers={"model_type": "SparseEncoder"}, tokenizer={})
    (folder / "onnx").mkdir()
    file = folder / "onnx" / "model.onnx"
    onnx.save(tiny_encoder.encoder(), file)
    elsewhere = written(tmp_path / "other", None, tokenizer={})
    for model in (folder, file):
        assert 'model_type is "SparseEncoder"' in refused(model)
        assert 'model_type is "SparseEncoder"' in refused(model, OnnxOptions(elsewhere))
        for verb in (["check"], ["export", "--out", str(tmp_path / "out")], ["analyze"]):
            assert cli.run([*verb, str(model), "--target", "x86-64-onnxruntime", "--quiet"]) == Unsupported.exit_code
            assert "SparseEncoder" in capsys.readouterr().err
    shutil.move(file, elsewhere / "model.onnx")  # the tokenizer's directory decides how vectors are made, too
    assert "SparseEncoder" in refused(elsewhere / "model.onnx", OnnxOptions(folder))


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["Transformer", "SpladePooling"], "SpladePooling: the model gives each text a weight for every word"),
        (["MLMTransformer", "Pooling"], "MLMTransformer: the model gives each text a weight"),
        (["sentence_transformers.sparse_encoder.modules.Novel"], "Novel: the model gives each text a weight"),
        (["Transformer", "Pooling", "SparseAutoEncoder"], "SparseAutoEncoder"),
        (["SparseStaticEmbedding"], "SparseStaticEmbedding"),
        (
            ["Transformer", "Dense", "MultiVectorMask", "Normalize"],
            "MultiVectorMask: the model gives a vector for each",
        ),
        (["Transformer", "pylate.models.Dense.Dense"], "pylate.models.Dense.Dense: the model gives a vector for each"),
        (
            ["Transformer", "sentence_transformers.cross_encoder.modules.LogitScore"],
            "LogitScore: the model gives scores",
        ),
        (["BoW", "Pooling"], "BoW; a bundle can hold Transformer, StaticEmbedding, Pooling"),
        (["Transformer", "sentence_transformers.models.NoSuch"], "NoSuch; a bundle can hold"),
        (["Transformer", "some.package.Pooling"], "some.package.Pooling, a class of an installed package"),
    ],
)
def test_modules_of_other_kinds_are_refused_where_nothing_else_says_so(
    modules: list[str], said: str, tmp_path: Path
) -> None:
    types = [item if "." in item else f"{_OWN}.{item}" for item in modules]
    assert said in refused(written(tmp_path / "model", types))


def test_heads_that_transformers_names_are_refused(tmp_path: Path) -> None:
    for head in ("BertForQuestionAnswering", "BertForMultipleChoice", "BertForTokenClassification"):
        folder = written(tmp_path / head, None, config={"model_type": "bert", "architectures": [head]})
        assert f"is saved as {head}" in refused(folder, pooling="mean")
    late = written(tmp_path / "late", None, config={"model_type": "bert", "architectures": ["HF_ColBERT"]})
    assert "architectures names HF_ColBERT: the model gives a vector for each token" in refused(late, pooling="mean")
    task = written(tmp_path / "task", [f"{_OWN}.Transformer"], sentence_bert_config={"transformer_task": "fill-mask"})
    assert 'transformer_task is "fill-mask": the model gives a weight for every word' in refused(task)


def test_modules_json_is_read_strictly(tmp_path: Path) -> None:
    pooling = {"idx": 1, "name": "0", "path": "1_Pooling", "type": f"{_OWN}.Pooling"}
    for row, (content, said) in enumerate(
        (
            ({"0": pooling}, "entry 0 is null; a list of objects"),
            ([pooling | {"type": 3}], "a list of objects with name, path and type"),
            ([pooling, pooling | {"path": "2_Pooling"}], "two modules have the name 0"),
            ([pooling | {"path": "../other"}], "outside of the directory"),
        )
    ):
        folder = written(tmp_path / str(row), None)
        (folder / "modules.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            locate.locate(str(folder))
    with pytest.raises(ConfigError, match="no JSON object"):
        locate.locate(str(written(tmp_path / "list", [], config_sentence_transformers=[])))


torch = pytest.importorskip("torch", reason="needs the extra `export`")
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import tiny_modules  # noqa: E402
import tiny_source  # noqa: E402
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder  # noqa: E402
from sentence_transformers.sentence_transformer import modules as own  # noqa: E402

from edgeq.frontend.torch.load import load_model  # noqa: E402
from edgeq.frontend.torch.supported_modules import require_listed  # noqa: E402


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.body(tmp_path_factory.mktemp("kinds") / "body", layers=1)


@pytest.mark.export
def test_what_sentence_transformers_saves_as_another_kind_is_refused(body: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    shutil.copytree(body, tmp_path / "masked")
    BertForMaskedLM(BertConfig.from_pretrained(body)).save_pretrained(tmp_path / "masked")
    splade = SparseEncoder(str(tmp_path / "masked"), device="cpu")
    splade.save_pretrained(str(tmp_path / "splade"), create_model_card=False)
    late = MultiVectorEncoder(str(body), device="cpu")
    late.save_pretrained(str(tmp_path / "late"), create_model_card=False)
    for name, kind, module in (("splade", "SparseEncoder", "Splade"), ("late", "MultiVectorEncoder", "MultiVector")):
        assert f'model_type is "{kind}"' in refused(tmp_path / name)
        (tmp_path / name / "config_sentence_transformers.json").unlink()  # now the modules alone say so
        message = refused(tmp_path / name)
        assert module in message and "relu" not in message and "torch.nn" not in message


@pytest.mark.export
def test_token_vectors_that_nothing_pools_are_refused(body: Path, tmp_path: Path) -> None:
    options = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    folder = tiny_modules.save(tmp_path / "tokens", own.Pooling(64), own.Dense(64, 8, **options), encoder=body)
    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    (folder / "modules.json").write_text(json.dumps([listed[0], listed[2]]), encoding="utf-8")
    with pytest.raises(Unsupported, match=r"modules \(Transformer, Dense\) give a vector for each token"):
        load_model(locate.locate(str(folder)))
    (folder / "modules.json").write_text(json.dumps([listed[1], listed[0]]), encoding="utf-8")
    with pytest.raises(Unsupported, match="its modules are Pooling, Transformer; one encoder"):
        load_model(locate.locate(str(folder)))


@pytest.mark.export
def test_the_modules_that_were_loaded_are_those_of_modules_json(body: Path, tmp_path: Path) -> None:
    folder = tiny_modules.save(tmp_path / "model", own.Pooling(64), own.Normalize(), encoder=body)
    model = load_model(locate.locate(str(folder)))
    require_listed(model, folder)
    path = folder / "modules.json"
    listed = json.loads(path.read_text(encoding="utf-8"))
    swapped = [listed[0], listed[2] | {"name": "1"}, listed[1] | {"name": "2"}]
    more = [*listed, listed[2] | {"name": "3"}]
    for content, said in (
        (swapped, r"module 1 \(2_Normalize\) is .*Normalize, and sentence-transformers loaded Pooling in its place"),
        (more, r"module 3 .* loaded nothing in its place"),
        (listed[:2], r"lists 2 modules, and sentence-transformers loaded Transformer, Pooling, Normalize"),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(Unsupported, match=said):
            require_listed(model, folder)


@pytest.mark.export
def test_modules_that_sentence_transformers_replaces_while_it_loads_are_refused(
    body: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_modules.save(tmp_path / "model", own.Pooling(64), own.Normalize(), encoder=body)
    monkeypatch.setattr(SentenceTransformer, "model_type", "Another")  # it then converts: Transformer and mean pooling
    with pytest.raises(Unsupported, match=r"module 2 .*Normalize, and sentence-transformers loaded nothing in its pl"):
        load_model(locate.locate(str(folder)))
