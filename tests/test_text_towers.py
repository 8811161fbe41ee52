"""Text towers of models of two: which token's vector they give, what padding means, and bundles of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
pytest.importorskip("PIL", reason="needs the extra `images`")

import architectures  # noqa: E402
import tiny_source  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

import edgeq  # noqa: E402
from edgeq.bundle.manifest import load_manifest  # noqa: E402
from edgeq.bundle.verify import verify  # noqa: E402
from edgeq.data.sessions import (  # noqa: E402
    embed_batches,  # noqa: E402
    unit,  # noqa: E402
)
from edgeq.data.tokenizer import Tokenizer  # noqa: E402
from edgeq.data.tokens import batches  # noqa: E402
from edgeq.errors import ConfigError, Unsupported  # noqa: E402
from edgeq.frontend import float_model, locate  # noqa: E402
from edgeq.frontend.torch.convert import convert  # noqa: E402
from edgeq.frontend.torch.load import load_model  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402
from edgeq.pipeline import stages  # noqa: E402
from edgeq.pipeline.export import export  # noqa: E402
from edgeq.pipeline.request import ExportRequest  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

TEXTS = [*tiny_source.texts(9, seed=5), "a", "red " * 200]
ORT = "x86-64-avx2-onnxruntime"


@pytest.fixture(scope="module", autouse=True)
def torch_in_this_process() -> Any:
    """Run torch here: a child for each model would spend its time on importing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_model, "_run_torch", lambda where, out, hidden: convert(where, out, hidden))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    made = {name: architectures.write(name, folder / name) for name in ("clip-tower", "siglip-tower")}
    made["largest id"] = architectures.write("clip-tower", folder / "largest id")
    config = json.loads((made["largest id"] / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["eos_token_id"] = 2  # as older models say: the end is where the id is largest
    (made["largest id"] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return made


def as_trained(directory: Path) -> np.ndarray:
    """Give the vectors that transformers itself gives single texts: float32[texts, dim]."""
    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    padding = "max_length" if "attention_mask" not in tokenizer.model_input_names else False
    vectors = []
    for text in TEXTS:
        feeds = tokenizer(text, padding=padding, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            vectors.append(model.get_text_features(**feeds).pooler_output.numpy()[0])
    return np.stack(vectors)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.sum(unit(first) * unit(second), axis=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "texts.txt").write_text("\n".join(tiny_source.texts(100)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("clip-tower", ("Transformer:text tower", "Pooling:lasttoken", "Dense")),
        ("siglip-tower", ("Transformer:text tower, padded to 64", "Pooling:lasttoken", "Dense")),
        ("largest id", ("Transformer",)),  # here the largest id is no last token: the graph picks it as it is
    ],
)
def test_the_float_model_gives_the_vectors_of_transformers(
    models: dict[str, Path], work: Path, name: str, modules: tuple[str, ...]
) -> None:
    floats = stages.float_model(locate.locate(str(models[name]), tower="text"), True, Cache(work / "cache"))
    assert floats.source.modules == modules and floats.source.max_sequence == 64
    tokens = Tokenizer.from_file(floats.config / "tokenizer.json", 64).encode(TEXTS)
    assert (min(map(len, tokens.ids)) == 64) == ("padded" in modules[0]) and tokens.longest == 64
    found = embed_batches(FloatSession.of(floats.folder / "model.onnx"), batches(tokens), len(TEXTS))
    expected = as_trained(models[name])
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    apart = np.linalg.norm(expected[0] - expected[1]) / np.linalg.norm(expected[0])
    assert apart > 1e-2


def exported(models: dict[str, Path], work: Path, name: str, *targets: str) -> list[Path]:
    request = ExportRequest(
        model=str(models[name]), targets=tuple(load_target(target) for target in targets), out=work / "out" / name,
        cache=Cache(work / "cache"), texts=work / "texts.txt", tower="text", keep_failed=True,
    )  # fmt: skip
    return [Path(item.path) for item in export(request, lambda *_: None)]


@pytest.fixture(scope="module")
def bundles(models: dict[str, Path], work: Path) -> dict[str, Path]:
    return {name: exported(models, work, name, ORT)[0] for name in ("clip-tower", "siglip-tower")}


def test_a_bundle_verifies_and_its_card_tells_how_to_run_it(
    bundles: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in bundles.items():
        assert verify(path).max_abs_error is not None
        vectors = edgeq.load(path, allow_failed=True).encode(TEXTS)
        expected = as_trained(models[name])
        cosines = (
            np.sum(vectors * expected, axis=1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
        )
        assert cosines.min() > 0.99
        card = (path / "README.md").read_text(encoding="utf-8")
        code = card.split("## Run it without edgeq")[1].split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(path)
        names: dict[str, Any] = {}
        exec(compile(code, "card", "exec"), names)
        assert np.abs(names["vectors"] - edgeq.load(path, allow_failed=True).encode(names["texts"])).max() < 1e-4
        assert 'backend="onnx"' not in card and not (path / "modules.json").is_file()
        assert load_manifest(path).source.kind == "transformers" and "--tower" in load_manifest(path).command


@pytest.mark.openvino
@pytest.mark.tflite
def test_other_backends_give_the_same_vectors(models: dict[str, Path], work: Path, bundles: dict[str, Path]) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    for name, bundle in bundles.items():
        first = edgeq.load(bundle, allow_failed=True).encode(TEXTS)
        for path in exported(models, work, name, "intel-openvino-cpu", "integer-only-w8a16"):
            vectors = edgeq.load(path, allow_failed=True).encode(TEXTS)
            assert cosines(vectors, first).min() > 0.98, path


def test_a_mask_that_the_vectors_do_not_follow_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(models["siglip-tower"], tmp_path / "masked"))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"model_input_names": ["input_ids", "attention_mask"]}), encoding="utf-8")
    with pytest.raises(Unsupported, match=r"masked: padding moves .* \"model_input_names\": \[\"input_ids\"\]"):
        load_model(locate.locate(str(directory), tower="text"))


def test_a_target_of_shorter_texts_than_the_model_reads_is_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="padded to 64 tokens, and 32 are asked for"):
        Tokenizer.from_file(bundles["siglip-tower"] / "tokenizer.json", 32)
