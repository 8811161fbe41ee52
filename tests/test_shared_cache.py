"""What an export finds in a cache that others have filled is what it would make in an empty one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import tiny_source  # noqa: E402

from edgeq.bundle.load import load  # noqa: E402
from edgeq.errors import ConfigError  # noqa: E402
from edgeq.frontend import float_model, locate, own_path  # noqa: E402
from edgeq.frontend.onnx.find import OnnxFile, OnnxOptions  # noqa: E402
from edgeq.pipeline import export  # noqa: E402
from edgeq.pipeline.request import ExportRequest  # noqa: E402
from edgeq.pipeline.stage_requests import FloatModelRequest  # noqa: E402
from edgeq.records import Gate  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402
from edgeq.system.made_by import own_code  # noqa: E402
from edgeq.system.progress import silent  # noqa: E402
from edgeq.system.stage import key  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

# Random weights hardly separate texts: only that the vectors are near is judged here.
EASY = Gate(
    centred_cosine_mean_min=0.9, centred_cosine_p01_min=0.5, centred_cosine_min_min=0.5, regret_mean_max=0.5,
    regret_p99_max=1.0, spearman_min=0.1, exactness_min=0.9, invariance_min=0.99999,
    norm_error_max=1e-3, norm_error_unnormalized_max=0.5, float_fallbacks_max=0, host_operators_max=0,
    export_run_kinds=("device", "host-kernels"), release_run_kinds=("device",),
)  # fmt: skip


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def limited(model: Path, folder: Path) -> Path:
    """Copy a model, with a limit of 16 tokens."""
    shutil.copytree(model, folder)
    edit(folder / "sentence_bert_config.json", lambda content: content.update(max_seq_length=16))
    return folder


def renumbered(model: Path, folder: Path) -> Path:
    """Copy a model, with the ids of half its words given to other words: the same weights, other tokens."""
    shutil.copytree(model, folder)

    def turn(content: dict[str, object]) -> None:
        vocabulary = content["model"]["vocab"]  # type: ignore[index]
        words = list(tiny_source.WORDS)
        ids = [vocabulary[word] for word in words]
        vocabulary |= dict(zip(words, ids[len(ids) // 2 :] + ids[: len(ids) // 2], strict=True))

    edit(folder / "tokenizer.json", turn)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.sentence_transformer(tmp_path_factory.mktemp("source") / "model")


def exported(model: Path, out: Path, cache: Cache) -> Path:
    out.parent.mkdir(exist_ok=True)
    texts = out.parent / "texts.txt"
    texts.write_text("\n".join(tiny_source.texts(120)), encoding="utf-8")
    target = load_target("x86-64-avx2-onnxruntime").model_copy(update={"gate": EASY})
    request = ExportRequest(model=str(model), targets=(target,), out=out, cache=cache, texts=texts)
    (made,) = export.export(request, silent)
    assert made.status == "passed"
    return Path(made.path)


def test_other_limits_and_tokenizers_find_nothing_of_each_other(model: Path, tmp_path: Path) -> None:
    filled, long = Cache(tmp_path / "filled"), " ".join(tiny_source.WORDS)
    short, other = limited(model, tmp_path / "short"), renumbered(model, tmp_path / "other")
    made = {}
    for folder, limit in ((short, 16), (other, 64)):
        made[folder] = exported(folder, tmp_path / "out" / folder.name, filled)
        embedder = load(made[folder])
        assert embedder.max_sequence == limit and np.isfinite(embedder.encode([long])).all()
    models = sorted(filled.root.glob("float-model/*/model.onnx"))
    assert len(models) == 2 and len({path.read_bytes() for path in models}) == 1  # their weights and graphs are one
    fresh = exported(other, tmp_path / "out" / "fresh", Cache(tmp_path / "empty"))
    assert (made[other] / "SHA256SUMS").read_bytes() == (fresh / "SHA256SUMS").read_bytes()


def test_only_the_files_of_the_key_can_be_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for name in ("README.md", "notes.npy", ".hidden.json", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    seen: list[str] = []

    def look(located: locate.Located, out_dir: Path, hidden_state: bool) -> None:
        seen.extend(path.relative_to(located.directory).as_posix() for path in located.directory.rglob("*"))
        raise ConfigError(f"{located.directory}/config.json: stopped here")

    monkeypatch.setattr(float_model, "_run_torch", look)
    located = locate.locate(str(folder))
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError) as caught:
        float_model.write_float_model(located, tmp_path / "out")
    assert str(caught.value) == f"{folder}/config.json: stopped here"  # not the folder of links
    assert {item.name for item in located.files} <= set(seen) and "config.json" in seen
    assert not {"README.md", "notes.npy", ".hidden.json", "onnx"} & set(seen)


def request(*given: object, **options: object) -> FloatModelRequest:
    located = locate.locate(*given, **options)  # type: ignore[arg-type]
    named = replace(located, name=located.display_name)
    return FloatModelRequest(made_by=own_code(), located=named, hidden_state=True)


@pytest.mark.parametrize(
    "name", ["config.json", "modules.json", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json",
             "config_sentence_transformers.json", "1_Pooling/config.json", "preprocessor_config.json", "vocab.txt"],
)  # fmt: skip
def test_every_file_of_a_model_is_in_the_float_models_key(name: str, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    before = key(request(str(folder)))
    path = folder / name
    path.write_text(path.read_text(encoding="utf-8") + "\n" if path.is_file() else "{}", encoding="utf-8")
    tower = "text" if name == "preprocessor_config.json" else None  # with it the model seems to take images, too
    assert key(request(str(folder), tower=tower)) != before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json",
             "special_tokens_map.json", "1_Pooling/config.json", "modules.json"],
)  # fmt: skip
def test_every_file_of_an_onnx_files_configuration_is_in_the_key(name: str, model: Path, tmp_path: Path) -> None:
    import onnx
    from encoder import encoder

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    onnx.save(encoder(), tmp_path / "model.onnx")
    options = OnnxOptions(folder)
    before = request(str(tmp_path / "model.onnx"), None, options)
    assert key(request(str(tmp_path / "model.onnx"), None, options)) == key(before)
    path = folder / name
    path.write_text(path.read_text(encoding="utf-8") + "\n" if path.is_file() else "{}", encoding="utf-8")
    after = request(str(tmp_path / "model.onnx"), None, options)
    assert key(after) != key(before) and after.located.sha256 != before.located.sha256


def test_a_reason_names_no_folder_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept in the cache and travels in the bundle, where a temporary folder's name would differ each time."""
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    failed = subprocess.CompletedProcess([], 1, "", f"OSError: no tokenizer in {tmp_path}/source")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    file = OnnxFile(tmp_path / "a.onnx", tmp_path / "tokenizer.json", tmp_path, 64, None, "onnx", "a" * 64)
    reason = own_path.of(locate.Located("a", tmp_path, False, "mean", "a" * 64, file), tmp_path)[0].reason
    assert reason is not None and "OSError: no tokenizer in its folder/source" in reason


def test_where_a_model_lies_is_not_in_the_key(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    keys = {key(request(str(model))), key(request("model")), key(request(str(tmp_path / "model")))}
    assert len(keys) == 1
    assert key(request("model", dim=8)) not in keys
