"""A copy with one layer shows what targets refuse in a large model, before the whole is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeq.errors import Unsupported
from edgeq.frontend import first_layer, locate
from edgeq.pipeline import stages, structure
from edgeq.quantization import schemes
from edgeq.system.cache import Cache
from edgeq.targets import load_target

LITERT, ORT = (
    (target, schemes.find(target.scheme, target.name))
    for target in map(load_target, ("android-litert", "x86-64-onnxruntime"))
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
    import tiny_source

    return tiny_source.sentence_transformer(tmp_path / "model")


def changed(directory: Path, **settings: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return directory


def test_a_large_model_is_refused_by_its_first_layer(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_layer, "LEAST_WEIGHT_BYTES", 0)
    cache = Cache(tmp_path / "cache")
    structure.require_of_first_layer(locate.locate(str(directory)), True, [LITERT], cache)  # nothing to refuse
    located = locate.locate(str(changed(directory, hidden_act="laplace")))
    with pytest.raises(Unsupported, match=r"android-litert: cannot take this model:\n(.*\n)*.*Erf has no integer"):
        structure.require_of_first_layer(located, True, [ORT, LITERT], cache)
    structure.require_of_first_layer(located, True, [ORT], cache)  # refuses no structure, so nothing is tried
    assert not list((tmp_path / "cache").glob("*/*"))


def test_what_the_cache_holds_or_does_not_load_decides_later(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_layer, "LEAST_WEIGHT_BYTES", 0)
    broken = locate.locate(str(changed(directory, model_type="bertt")))
    structure.require_of_first_layer(broken, True, [LITERT], Cache(tmp_path / "cache"))
    located = locate.locate(str(changed(directory, model_type="bert")))
    cache = Cache(tmp_path / "cache")
    assert not stages.has_float_model(located, True, cache)
    stages.float_model(located, True, cache)
    assert stages.has_float_model(located, True, cache) and not stages.has_float_model(located, False, cache)
    monkeypatch.setattr(structure, "first_layer", None)  # not called
    structure.require_of_first_layer(located, True, [LITERT], cache)


def test_a_copy_keeps_all_but_the_further_layers(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(directory, layer_types=["full", "local"], widths=[1, 2, 3])
    located = locate.locate(str(directory))
    assert first_layer.first_layer(located, tmp_path / "small") is None
    monkeypatch.setattr(first_layer, "LEAST_WEIGHT_BYTES", 0)
    copy = first_layer.first_layer(located, tmp_path / "copy")
    assert copy is not None and [item.name for item in copy.files] == [item.name for item in located.files]
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"], config["widths"]) == (1, ["full"], [1, 2, 3])
    again = locate.locate(str(changed(directory, num_hidden_layers=1)))
    assert first_layer.first_layer(again, tmp_path / "again") is None
