"""Chains of sentence-transformers' modules: what a bundle keeps of them, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import tiny_modules  # noqa: E402
import tiny_source  # noqa: E402
import torch  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Router  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402

import edgeq  # noqa: E402
from edgeq.bundle.manifest import load_manifest  # noqa: E402
from edgeq.bundle.verify import verify  # noqa: E402
from edgeq.data.tokenizer import Tokenizer  # noqa: E402
from edgeq.errors import ConfigError, Unsupported  # noqa: E402
from edgeq.frontend import float_model, locate  # noqa: E402
from edgeq.frontend.torch import sentence_transformers  # noqa: E402
from edgeq.frontend.torch.configuration import pooling_config  # noqa: E402
from edgeq.frontend.torch.convert import convert  # noqa: E402
from edgeq.frontend.torch.load import load_model  # noqa: E402
from edgeq.frontend.torch.session import reopen  # noqa: E402
from edgeq.pipeline.export import export  # noqa: E402
from edgeq.pipeline.request import ExportRequest  # noqa: E402
from edgeq.records import Target  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

DIM = tiny_source.DIM
ORT = "x86-64-avx2-onnxruntime"
TEXTS = [*tiny_source.texts(9, seed=5), "The RED Tree", "a"]
PROMPTS = {"query": "blue ", "passage": "red river "}
OTHER_ENVIRONMENT = os.environ.get("EDGEQ_SENTENCE_TRANSFORMERS_PYTHON")
# How a chain is made: (modules behind the encoder, options of SentenceTransformer, --dim).
Chain = tuple[Any, dict[str, Any], int | None]


@pytest.fixture(scope="module", autouse=True)
def torch_in_this_process() -> Any:
    """Run torch here: a child for each of so many models would spend its time on importing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_model, "_run_torch", lambda where, out, hidden: convert(where, out, hidden))
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.body(tmp_path_factory.mktemp("encoder") / "body", layers=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "texts.txt").write_text("\n".join(tiny_source.texts(1500)), encoding="utf-8")
    return folder


ACTIVATIONS = (
    "CELU", "ELU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish", "PReLU",
    "ReLU6", "SELU", "SiLU", "Softplus", "Softshrink", "Softsign", "Tanhshrink", "Identity",
)  # fmt: skip


def dense(activation: str) -> Any:
    """Give a layer whose inputs are large enough for its activation to bend them."""
    layer = modules.Dense(DIM, DIM, activation_function=getattr(torch.nn, activation)())
    torch.nn.init.orthogonal_(layer.linear.weight, gain=2.0)
    return layer


def chains() -> dict[str, Chain]:
    torch.manual_seed(2)
    return {
        "dense": (
            (
                modules.Pooling(DIM), modules.Dense(DIM, 48, activation_function=torch.nn.GELU()),
                modules.Dense(48, 40, activation_function=torch.nn.SiLU()), modules.LayerNorm(40),
                modules.Normalize(),
            ),
            {"prompts": PROMPTS, "default_prompt_name": "query"}, None,
        ),
        "activations": ((modules.Pooling(DIM), *(dense(item) for item in ACTIVATIONS), modules.Normalize()), {}, None),
        "several poolings": ((modules.Pooling(DIM, pooling_mode=("mean", "cls", "max")),), {}, None),
        "truncated": ((modules.Pooling(DIM, pooling_mode="weightedmean"), modules.Normalize()), {}, 24),
        "truncated by itself": (
            (modules.Pooling(DIM, pooling_mode="cls"), modules.Normalize()), {"truncate_dim": 20}, None,
        ),
        "lower case": (
            (modules.Pooling(DIM, pooling_mode="lasttoken"),), {"transformer": {"do_lower_case": True}}, None,
        ),
        "decoder, padded left": ((modules.Pooling(DIM, pooling_mode="lasttoken"), modules.Normalize()), {}, None),
    }  # fmt: skip


def easy(name: str, **gate: float) -> Target:
    """Give a target that judges only that vectors are near: random weights hardly separate texts."""
    target = load_target(name)
    limits = {
        "centred_cosine_mean_min": 0.9, "centred_cosine_p01_min": 0.8, "centred_cosine_min_min": 0.8,
        "regret_mean_max": 0.9, "regret_p99_max": 1.0, "spearman_min": 0.1,
        "invariance_min": 0.999, "norm_error_max": 1.5e-2, "norm_error_unnormalized_max": 0.1, **gate,
    }  # fmt: skip
    buckets = (16, 64) if target.buckets_tokens else ()
    return target.model_copy(update={"gate": target.gate.model_copy(update=limits), "buckets_tokens": buckets})


def exported(work: Path, model: Path, *targets: str, dim: int | None = None) -> list[Path]:
    request = ExportRequest(
        model=str(model), targets=tuple(easy(name) for name in targets), out=work / "out" / model.name,
        cache=Cache(work / "cache"), texts=work / "texts.txt", samples=80, dim=dim,
    )  # fmt: skip
    made = export(request, lambda *_: None)
    assert [(item.status, item.failures) for item in made] == [("passed", ())] * len(targets)
    return [Path(item.path) for item in made]


@pytest.fixture(scope="module")
def bundles(work: Path, encoder: Path) -> dict[str, Path]:
    found = {}
    decoder = tiny_modules.decoder(work / "decoder-body")
    for name, (following, options, dim) in chains().items():
        body = decoder if name.startswith("decoder") else encoder
        model = tiny_modules.save(work / name.replace(" ", "-"), *following, encoder=body, **options)
        (found[name],) = exported(work, model, ORT, dim=dim)
    return found


def float_vectors(path: Path, work: Path, texts: list[str]) -> np.ndarray:
    """Run the float model that a bundle was made from."""
    manifest = load_manifest(path)
    entry = next(
        file for file in (work / "cache").rglob("model.onnx")
        if file.stat().st_size == manifest.float_model.file.size_bytes
        and edgeq.system.files.sha256_file(file) == manifest.float_model.file.sha256
    )  # fmt: skip
    loaded = edgeq.load(path)
    return edgeq.bundle.embedder.Embedder(
        edgeq.graph.float_session.FloatSession.of(entry),
        edgeq.data.tokenizer.Tokenizer.from_file(path / "tokenizer.json", loaded.max_sequence),
        manifest,
    ).encode(texts)


def test_the_float_models_give_the_vectors_of_sentence_transformers(bundles: dict[str, Path], work: Path) -> None:
    for name, path in bundles.items():
        _, _, dim = chains()[name]
        model = SentenceTransformer(str(work / name.replace(" ", "-")), device="cpu")
        expected = model.encode(TEXTS, truncate_dim=dim, normalize_embeddings=dim is not None)
        found = float_vectors(path, work, TEXTS)
        assert found.shape == expected.shape, name
        assert np.abs(found - expected).max() < 1e-5, name
        assert np.abs(expected[0] - expected[1]).max() > 1e-3, name  # the texts are told apart


PROGRAM = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
texts, errors = json.loads(sys.argv[1]), {}
for path in sys.argv[2:]:
    model = SentenceTransformer(path, backend="onnx")
    kept = np.load(path + "-expected.npz")
    found = {"plain": model.encode(texts), "query": model.encode_query(texts), "document": model.encode_document(texts)}
    errors[path] = max(float(np.abs(found[name] - kept[name]).max()) for name in kept.files)
print(json.dumps(errors))
"""


@pytest.mark.sentence_transformers
@pytest.mark.skipif(not OTHER_ENVIRONMENT, reason="EDGEQ_SENTENCE_TRANSFORMERS_PYTHON names no environment")
def test_sentence_transformers_opens_each_bundle_and_gives_the_vectors_of_edgeq(bundles: dict[str, Path]) -> None:
    for path in bundles.values():
        loaded = edgeq.load(path)
        plain, query, document = loaded.encode(TEXTS), loaded.encode_query(TEXTS), loaded.encode_document(TEXTS)
        np.savez(f"{path}-expected.npz", plain=plain, query=query, document=document)
    done = subprocess.run(
        [str(OTHER_ENVIRONMENT), "-c", PROGRAM, json.dumps(TEXTS), *map(str, bundles.values())],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(bundles) >= 6 and max(errors.values()) < 1e-5, errors


def test_the_manifest_and_the_card_tell_of_truncation_and_prompts(bundles: dict[str, Path]) -> None:
    manifest = load_manifest(bundles["truncated"])
    assert manifest.source.dim == 24 == sentence_transformers.truncated_to(manifest.source.modules)
    assert manifest.source.modules == ("Transformer", "Pooling:weightedmean", "Truncate:24 of 64", "Normalize")
    assert manifest.command[manifest.command.index("--dim") + 1] == "24"
    card = (bundles["truncated"] / "README.md").read_text(encoding="utf-8")
    assert "cut to the first 24 dimensions, and brought to unit length again." in card
    vectors = edgeq.load(bundles["truncated"]).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    own = bundles["truncated by itself"]
    assert "cut to the first 20 dimensions." in (own / "README.md").read_text(encoding="utf-8")
    assert np.linalg.norm(edgeq.load(own).encode(TEXTS), axis=1).max() < 0.95
    manifest = load_manifest(bundles["dense"])
    assert manifest.source.prompts == {**PROMPTS, "document": ""}
    card = (bundles["dense"] / "README.md").read_text(encoding="utf-8")
    assert '- query: `"blue "` (the default)' in card and "encode_query(texts)" in card


def test_the_source_is_found_again_with_its_dimensions(bundles: dict[str, Path], work: Path) -> None:
    for name in ("truncated", "truncated by itself"):
        manifest = load_manifest(bundles[name])
        located = reopen(manifest.source, str(work / name.replace(" ", "-")))
        assert (located.sha256, located.dim) == (manifest.source.sha256, chains()[name][2])


def test_a_static_embedding_runs_in_every_kind_of_runtime(work: Path) -> None:
    model = tiny_modules.static(work / "static", modules.Normalize(), longest=40)
    (path,) = exported(work, model, ORT)
    expected = SentenceTransformer(str(model), device="cpu").encode([*TEXTS, " "])
    assert np.abs(float_vectors(path, work, [*TEXTS, " "]) - expected).max() < 1e-5
    manifest = load_manifest(path)
    assert manifest.source.modules == ("StaticEmbedding", "Pooling:mean", "Normalize")
    assert manifest.source.max_sequence == 40  # the tokenizer's own limit
    graph = onnx.load(path / "onnx" / "model.onnx").graph
    tables = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    codes = next(name for name in tables if name.endswith("/codes"))
    assert tables[codes].data_type == onnx.TensorProto.INT8
    assert list(tables[codes.replace("/codes", "/scale")].dims) == [tables[codes].dims[0], 1]  # one for each row
    assert not (path / "modules.json").exists()
    assert "backend=" not in (path / "README.md").read_text(encoding="utf-8")
    assert (verify(path).max_abs_error or 0.0) < 1e-6  # the batch is another one


@pytest.mark.tflite
def test_static_embeddings_and_truncations_are_integer_only_in_litert(work: Path, encoder: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    model = tiny_modules.static(work / "static-litert", modules.Normalize())
    (path,) = exported(work, model, "integer-only-w8a16", dim=24)
    assert load_manifest(path).source.dim == 24
    assert edgeq.load(path).encode(TEXTS).shape == (len(TEXTS), 24)
    chain, options, dim = chains()["truncated"]
    model = tiny_modules.save(work / "truncated", *chain, encoder=encoder, **options)
    (path,) = exported(work, model, "raspberry-pi-litert", dim=dim)
    assert edgeq.load(path).encode(TEXTS).shape == (len(TEXTS), 24)
    chain, options, dim = chains()["several poolings"]
    model = tiny_modules.save(work / "several-poolings", *chain, encoder=encoder, **options)
    (path,) = exported(work, model, "raspberry-pi-litert")
    assert edgeq.load(path).encode(TEXTS).shape == (len(TEXTS), 3 * DIM)


@pytest.mark.openvino
def test_openvino_takes_chains_as_they_are(work: Path, bundles: dict[str, Path]) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    for name in ("dense", "activations", "several poolings", "truncated"):
        (path,) = exported(work, work / name.replace(" ", "-"), "intel-openvino-cpu", dim=chains()[name][2])
        assert edgeq.load(path).dim == load_manifest(bundles[name]).source.dim


def refused(directory: Path, dim: int | None = None) -> str:
    with pytest.raises((ConfigError, Unsupported)) as caught:
        load_model(locate.locate(str(directory), dim=dim))
    return str(caught.value)


def test_what_no_graph_can_hold_is_refused_with_the_way_out(tmp_path: Path, encoder: Path) -> None:
    for dim, message in ((0, "--dim is 0"), (-3, "--dim is -3")):
        with pytest.raises(ConfigError, match=message):
            locate.locate(str(encoder), "mean", dim=dim)
    plain = tiny_modules.save(tmp_path / "plain", modules.Pooling(DIM), encoder=encoder)
    assert "--dim is 65; the model's vectors have 64 dimensions" in refused(plain, 65)
    behind = tiny_modules.save(
        tmp_path / "behind", modules.Pooling(DIM), modules.Normalize(), modules.Dense(DIM, 80), encoder=encoder
    )
    assert "Dense stands behind Normalize" in refused(behind, 8)
    left_out = tiny_modules.save(
        tmp_path / "left-out", modules.Pooling(DIM, include_prompt=False), encoder=encoder, prompts={"query": "red "}
    )
    assert "include_prompt is false" in refused(left_out)
    routes = [[modules.StaticEmbedding.load(str(tiny_modules.static(tmp_path / name)))] for name in ("a", "b")]
    router = Router.for_query_document(query_modules=routes[0], document_modules=routes[1])
    SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path / "router"), create_model_card=False)
    message = refused(tmp_path / "router")
    assert "Router sends texts through different modules (query, document)" in message and ".save(...)" in message
    odd = tiny_modules.save(tmp_path / "odd", modules.Pooling(DIM), modules.Dense(DIM, 8), encoder=encoder)
    config = odd / "2_Dense" / "config.json"
    text = config.read_text(encoding="utf-8").replace("torch.nn.modules.activation.Tanh", "somewhere.MyTanh")
    config.write_text(text, encoding="utf-8")
    assert "activation_function is somewhere.MyTanh" in refused(odd)


def test_pooling_modes_keep_their_order_for_every_version_of_sentence_transformers() -> None:
    flags = pooling_config(modules.Pooling(DIM, pooling_mode=("cls", "max", "mean")))
    assert "pooling_mode" not in flags and sum(value is True for value in flags.values()) == 4  # include_prompt, too
    ordered = pooling_config(modules.Pooling(DIM, pooling_mode=("mean", "cls")))
    assert ordered["pooling_mode"] == ["mean", "cls"]


def test_a_tokenizer_that_pads_left_and_gives_no_mask_is_mended(tmp_path: Path, encoder: Path) -> None:
    from transformers import AutoTokenizer

    plain = tmp_path / "left"
    tokenizer = AutoTokenizer.from_pretrained(encoder, padding_side="left", truncation_side="left")
    tokenizer.save_pretrained(plain)
    config = json.loads((plain / "tokenizer_config.json").read_text(encoding="utf-8"))
    bare = config | {"model_input_names": ["input_ids"]}
    (plain / "tokenizer_config.json").write_text(json.dumps(bare), encoding="utf-8")
    for name in ("config.json", "model.safetensors"):
        (plain / name).write_bytes((encoder / name).read_bytes())
    model = tiny_modules.save(tmp_path / "model", modules.Pooling(DIM), encoder=plain)
    located = locate.locate(str(model))
    (tmp_path / "out").mkdir()
    record, _ = float_model.write_float_model(located, tmp_path / "out")
    folder = tmp_path / "out" / float_model.CONFIG
    kept = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert kept["padding_side"] == "right" and kept["model_input_names"] == ["input_ids", "attention_mask"]
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast"  # which every version of transformers knows
    cutting = Tokenizer.from_file(folder / "tokenizer.json", 8).encode([" ".join(tiny_source.WORDS)])
    last = tokenizer(tiny_source.WORDS[-1])["input_ids"][-2]
    assert cutting.ids[0][-2] == last  # a long text loses its beginning
    batches = edgeq.data.tokens.batches(Tokenizer.from_file(folder / "tokenizer.json", 64).encode(TEXTS))
    session = edgeq.graph.float_session.FloatSession.of(tmp_path / "out" / float_model.MODEL)
    found = edgeq.data.sessions.embed_batches(session, batches, len(TEXTS))
    alone = SentenceTransformer(str(model), device="cpu").encode(TEXTS, batch_size=1)
    assert np.abs(found - alone).max() < 1e-5
    assert record.inputs == ("input_ids", "attention_mask")


def test_a_model_without_a_mask_is_refused_where_padding_moves_a_vector() -> None:
    near, far = np.ones((1, 4), np.float32), np.full((2, 4), 1.2, np.float32)
    assert sentence_transformers.depends_on_padding([near, far])
    assert sentence_transformers.depends_on_padding([near, np.full((2, 4), np.nan, np.float32)])
    assert not sentence_transformers.depends_on_padding([near, np.ones((3, 4), np.float32)])


def test_a_limit_beyond_the_positions_is_lowered(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    plain = tiny_source.body(tmp_path / "plain")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=200, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=0, type_vocab_size=1,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).eval().save_pretrained(plain)
    model = tiny_modules.save(
        tmp_path / "model", modules.Pooling(DIM), encoder=plain, transformer={"max_seq_length": 500}
    )
    loaded = load_model(locate.locate(str(model)))
    assert loaded.max_seq_length == 39  # the row of padding is no position
    (tmp_path / "out").mkdir()
    longest = " ".join(tiny_source.WORDS)
    assert np.isfinite(loaded.encode([longest])).all()


def test_a_dropout_changes_nothing(encoder: Path, tmp_path: Path) -> None:
    model = tiny_modules.save(
        tmp_path / "model", modules.Pooling(DIM), modules.Dropout(0.5), modules.Normalize(), encoder=encoder
    )
    loaded = load_model(replace(locate.locate(str(model)), dim=8))
    assert sentence_transformers.names(loaded) == (
        "Transformer",
        "Pooling:mean",
        "Truncate:8 of 64",
        "Dropout",
        "Normalize",
    )
