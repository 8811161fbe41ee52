"""A bundle's tokens and FP32's vectors are those of sentence-transformers' own encode, encode_query and so on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import given_onnx  # noqa: E402
import tiny_modules  # noqa: E402
import tiny_source  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402

from edgeq.bundle.load import load  # noqa: E402
from edgeq.bundle.manifest import load_report  # noqa: E402
from edgeq.data import end_to_end  # noqa: E402
from edgeq.data.text_input import METHODS, Method, TextInput  # noqa: E402
from edgeq.data.tokenizer import Tokenizer  # noqa: E402
from edgeq.errors import EdgeqError, ParityFailed  # noqa: E402
from edgeq.frontend import float_model, own_path  # noqa: E402
from edgeq.frontend.locate import locate  # noqa: E402
from edgeq.frontend.onnx.find import OnnxOptions  # noqa: E402
from edgeq.pipeline.export import export  # noqa: E402
from edgeq.pipeline.request import ExportRequest  # noqa: E402
from edgeq.pipeline.validate import validate  # noqa: E402
from edgeq.records import Source, Target  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

PROMPTS = {"query": "find the ", "passage": "read the ", "other": "one "}
LONG = "the green bird of the old river and a stone " * 8


@dataclass(frozen=True)
class Made:
    """Hold a directory, what edgeq makes of it, and its own model."""

    directory: Path
    out: Path
    source: Source

    @property
    def config(self) -> Path:
        return self.out / float_model.CONFIG

    def tokens(self, text: str, method: Method) -> tuple[int, ...]:
        """Give the ids as `edgeq.load(...)` would."""
        tokenizer = Tokenizer.from_file(self.config / "tokenizer.json", self.source.max_sequence)
        return TextInput(tokenizer, self.source).tokens([text], method).ids[0]

    def compared(self) -> end_to_end.EndToEnd:
        return end_to_end.compare(self.config, self.source, self.source.max_sequence)


def own_ids(directory: Path, text: str, prompt: str = "", task: str | None = None) -> tuple[int, ...]:
    """Give the ids as sentence-transformers does."""
    model = SentenceTransformer(str(directory), device="cpu")
    return tuple(model.preprocess([prompt + text], task=task)["input_ids"][0].tolist())


def made(folder: Path, name: str, write: Callable[[Path], Path], changes: dict[str, dict[str, object]]) -> Made:
    """Write a directory, change its files, and convert it."""
    directory = write(folder / name)
    for file, change in changes.items():
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    out = folder / f"{name}-out"
    out.mkdir()
    source, _ = float_model.write_float_model(locate(str(directory)), out)
    return Made(directory, out, source)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Queries and documents have lengths and prompts of their own; a cased tokenizer is made lower case."""
    return made(
        tmp_path_factory.mktemp("lengths"), "model",
        lambda path: tiny_source.sentence_transformer(path, prompts=PROMPTS),
        {
            "sentence_bert_config.json": {
                "max_seq_length": 24, "do_lower_case": True, "query_length": 8, "document_length": 12,
            },
            "config_sentence_transformers.json": {"default_prompt_name": "other", "flavour": "mint"},
            "tokenizer.json": {"normalizer": None},
        },
    )  # fmt: skip


def test_each_method_has_its_own_length_and_prompt(lengths: Made) -> None:
    assert (lengths.source.query_length, lengths.source.document_length) == (8, 12)
    assert lengths.source.unused_settings == ("config_sentence_transformers.json: flavour (unknown)",)
    wanted = {"encode": ("one ", None, 24), "encode_query": ("find the ", "query", 8),
              "encode_document": ("", "document", 12)}  # fmt: skip
    for method, (prompt, task, length) in wanted.items():
        found = lengths.tokens(LONG.upper(), method)  # type: ignore[arg-type]
        assert found == own_ids(lengths.directory, LONG.upper(), prompt, task)
        assert len(found) == length
        assert 1 not in found  # [UNK], which upper case would be


def test_texts_of_every_kind_were_compared(lengths: Made) -> None:
    found = lengths.compared()
    assert (found.status, found.failures) == ("passed", ())
    assert found.compared == len(end_to_end.texts(24))
    assert found.vectors > found.compared
    assert found.cosine_min is not None
    assert found.cosine_min > 1 - 1e-9
    assert found.error_max is not None
    assert found.error_max < 1e-5


def test_the_list_holds_odd_and_long_texts() -> None:
    texts = end_to_end.texts(32)
    assert len(set(texts)) == len(texts)
    for odd in ("\u0130", "[MASK]", "<mask>", "[SEP]", "\u200d", "\ud55c", "\u1112\u1161", "\u6211", "\x07", "\u05e9"):
        assert any(odd in text for text in texts)
    assert {"", " "} < set(texts)
    assert sum(len(text.split()) > 32 for text in texts) >= 3


def cased(tokenizer: dict[str, object]) -> None:
    tokenizer["normalizer"] = None


def without_special_tokens(tokenizer: dict[str, object]) -> None:
    tokenizer["post_processor"] = None


def cut_left(tokenizer: dict[str, object]) -> None:
    tokenizer["truncation"] = {"direction": "Left", "max_length": 24, "strategy": "LongestFirst", "stride": 0}


def without_mask_token(tokenizer: dict[str, object]) -> None:
    tokenizer["added_tokens"] = [item for item in tokenizer["added_tokens"] if item["content"] != "[MASK]"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", [cased, without_special_tokens, cut_left, without_mask_token])
def test_a_damaged_tokenizer_fails(lengths: Made, tmp_path: Path, damage: Callable[[dict[str, object]], None]) -> None:
    config = tmp_path / "config"
    shutil.copytree(lengths.config, config)
    tokenizer = json.loads((config / "tokenizer.json").read_text(encoding="utf-8"))
    damage(tokenizer)
    (config / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    found = end_to_end.compare(config, lengths.source, 24)
    assert found.status == "failed"
    with pytest.raises(ParityFailed, match=r"encode\(.*from position \d+ on they differ, \w+ (id )?and \w+"):
        end_to_end.require_same(found, "model")


@pytest.mark.parametrize(
    "change",
    [
        {"query_length": None}, {"query_length": 9}, {"document_length": 8}, {"max_sequence": 23}, {"prompts": {}},
        {"default_prompt_name": None}, {"default_prompt_name": "query"},
    ],
)  # fmt: skip
def test_a_dropped_setting_fails(lengths: Made, change: dict[str, object]) -> None:
    source = lengths.source.model_copy(update=change)
    assert end_to_end.compare(lengths.config, source, source.max_sequence).status == "failed"


def test_a_shorter_target_is_compared_on_what_it_holds(lengths: Made) -> None:
    found = end_to_end.compare(lengths.config, lengths.source, 16)
    assert found.status == "passed"
    assert 20 < found.compared <= lengths.compared().compared


def test_other_vectors_fail(lengths: Made, tmp_path: Path) -> None:
    """The vectors of a model that pools otherwise, or whose last text is another's, are not the model's own."""
    config = tmp_path / "config"
    shutil.copytree(lengths.config, config)
    own = end_to_end.read(config)
    rng = np.random.default_rng(0)
    vectors = {"encode": {0: rng.standard_normal(64).astype(np.float32)}}
    with pytest.raises(ParityFailed, match=r"encode\('A dog runs.*FP32's vector is .* of its length away"):
        own_path.compare((own, vectors), lengths.source, config, lengths.out / float_model.MODEL)  # type: ignore[arg-type]


def test_a_vector_without_length_is_no_match() -> None:
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert end_to_end.distance("encode", 0, zero, zero).error == 0.0
    for pair in ((zero, one), (one, zero), (one * np.nan, one)):
        assert end_to_end.distance("encode", 0, *pair).error == 1.0
    assert end_to_end.distance("encode", 0, 2 * one, one).error == pytest.approx(1.0)  # the cosine alone is 1


def test_the_length_of_processing_kwargs_cuts_every_method(tmp_path: Path) -> None:
    found = made(
        tmp_path, "model", tiny_source.sentence_transformer,
        {"sentence_bert_config.json": {
            "processing_kwargs": {"text": {"max_length": 16, "truncation": True}}, "query_length": 8,
        }},
    )  # fmt: skip
    assert (found.source.max_sequence, found.source.query_length) == (16, None)
    assert found.compared().status == "passed"
    for method in METHODS:
        assert found.tokens(LONG, method) == own_ids(found.directory, LONG)
        assert len(found.tokens(LONG, method)) == 16


def test_texts_are_cut_on_the_side_of_the_tokenizer_and_not_of_its_file(tmp_path: Path) -> None:
    given = tiny_modules.decoder(tmp_path / "body", padding_side="right")
    path = given / "tokenizer.json"
    cut = {"direction": "Left", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"truncation": cut}), encoding="utf-8")
    pooling = modules.Pooling(tiny_source.DIM, pooling_mode="lasttoken")
    found = made(tmp_path, "model", lambda path: tiny_modules.save(path, pooling, encoder=given), {})
    assert found.compared().status == "passed"
    assert found.compared().reason is None or "''" in found.compared().reason  # a text without a token has no vector


def test_a_table_of_token_vectors_is_compared(tmp_path: Path) -> None:
    found = made(tmp_path, "model", lambda path: tiny_modules.static(path, modules.Normalize(), longest=20), {})
    assert found.compared().status == "passed"
    assert found.compared().vectors > 30
    assert len(found.tokens(LONG, "encode")) == 20


def test_a_plain_directory_is_compared_with_transformers_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    located = locate(str(tiny_source.body(tmp_path / "body", layers=1)), "mean")
    source, _ = float_model.write_float_model(located, tmp_path / "out")
    found = end_to_end.compare(tmp_path / "out" / float_model.CONFIG, source, 64)
    assert (found.status, found.vectors, found.cosine_min) == ("passed", 0, None)
    assert found.against is not None
    assert found.against.startswith("transformers ")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    return given_onnx.legacy(tiny_source.body(folder / "body", layers=1), folder / "encoder.onnx", 14)


def test_an_onnx_file_is_compared_with_transformers_tokenizer_beside_it(onnx_file: Path, tmp_path: Path) -> None:
    body = onnx_file.with_name("body")
    (tmp_path / "out").mkdir()
    located = locate(str(onnx_file), "mean", OnnxOptions(body))
    source, _ = float_model.write_float_model(located, tmp_path / "out")
    found = end_to_end.compare(tmp_path / "out" / float_model.CONFIG, source, source.max_sequence)
    assert (found.status, found.compared > 30, found.vectors) == ("passed", True, 0)
    # transformers lowers nothing here, and tokenizer.json alone would
    other = shutil.copytree(body, tmp_path / "cut-left")
    config = json.loads((other / "tokenizer_config.json").read_text(encoding="utf-8"))
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "left"}), encoding="utf-8")
    (tmp_path / "other").mkdir()
    with pytest.raises(ParityFailed, match="tokenizer.json gives 64 token ids and transformers .* 64; from position"):
        float_model.write_float_model(locate(str(onnx_file), "mean", OnnxOptions(other)), tmp_path / "other")


def test_without_a_directory_nothing_is_compared_and_nothing_passes(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(onnx_file.with_name("body") / "tokenizer.json", tmp_path / "alone")
    (tmp_path / "out").mkdir()
    options = OnnxOptions(tmp_path / "alone" / "tokenizer.json", max_sequence=32)
    source, _ = float_model.write_float_model(locate(str(onnx_file), "mean", options), tmp_path / "out")
    found = end_to_end.compare(tmp_path / "out" / float_model.CONFIG, source, 32)
    assert (found.status, found.compared) == ("not compared", 0)
    assert found.reason == "no tokenizer_config.json lies beside the ONNX file's tokenizer.json"


def easy_target() -> Target:
    target = load_target("x86-64-onnxruntime")
    limits = {
        "centred_cosine_mean_min": 0.9,
        "centred_cosine_p01_min": 0.8,
        "centred_cosine_min_min": 0.8,
        "regret_mean_max": 0.9,
        "regret_p99_max": 1.0,
        "spearman_min": 0.1,
    }
    return target.model_copy(update={"gate": target.gate.model_copy(update=limits)})


def damage(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    cased(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_bundle_carries_its_own_comparison(lengths: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of an export has it, `edgeq.load` obeys it, and `validate` and another export find a damage."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(tiny_source.texts(100)), encoding="utf-8")
    request = ExportRequest(
        model=str(lengths.directory), targets=(easy_target(),), out=tmp_path / "out", cache=Cache(tmp_path / "cache"),
        texts=texts,
    )  # fmt: skip
    (found,) = export(request, lambda *_: None)
    assert found.end_to_end is not None
    assert found.end_to_end.status == "passed"
    bundle = Path(found.path)
    assert load_report(bundle).end_to_end == found.end_to_end
    model, loaded = SentenceTransformer(str(lengths.directory), device="cpu"), load(bundle)
    for method in METHODS:
        own, mine = (getattr(side, method)([LONG, "a bird", ""]) for side in (model, loaded))
        assert np.sum(own * mine, axis=1).min() > 0.95
    saved = json.loads((bundle / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert (saved["query_length"], saved["document_length"]) == (8, 12)
    (floats,) = (tmp_path / "cache").glob("float-model/*/model.onnx")
    assert validate(bundle, None, None, floats, lambda *_: None).end_to_end == found.end_to_end
    damage(bundle)
    again = validate(bundle, None, None, floats, lambda *_: None)
    assert (again.status, again.end_to_end.status) == ("failed", "failed")
    assert again.end_to_end.failures[0] in again.failures
    monkeypatch.setattr("edgeq.bundle.write.state_limit", lambda folder, limit: damage(folder))
    with pytest.raises(ParityFailed, match="texts come out otherwise than from the model itself"):
        export(replace(request, overwrite=True), lambda *_: None)


def test_a_damaged_list_of_ids_is_refused(lengths: Made, tmp_path: Path) -> None:
    config = shutil.copytree(lengths.config, tmp_path / "config")
    (config / end_to_end.FILE).write_text('{"against": 3}', encoding="utf-8")
    with pytest.raises(EdgeqError, match="Fetch or export the bundle again"):
        end_to_end.compare(config, lengths.source, 24)
