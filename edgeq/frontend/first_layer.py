"""Copy a model's directory with a configuration of one layer, so that what targets refuse is known within seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeq.frontend.locate import Located
from edgeq.system.stage import InputFile, input_file, linked

_CONFIG, _MODULES = "config.json", "modules.json"
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # of transformers' configurations
_WEIGHTS = (".safetensors", ".bin")
LEAST_WEIGHT_BYTES = 200_000_000  # below it a whole export to ONNX takes no longer than that of two models


def first_layer(located: Located, folder: Path) -> Located | None:
    """Write a folder of links to a model's files, beside a configuration that keeps the first layer alone.

    transformers loads the weights of that layer and of all around the layers, and leaves out the rest.

    Args:
        located: the model.
        folder: to write; it must not exist.

    Returns:
        The copy, with the same name. None where the model is small, an ONNX file, of images, brings code of its own, or
        its configuration states no number of layers.
    """
    if located.onnx is not None or located.tower is not None or located.code:
        return None
    weights = sum(item.file.size_bytes for item in located.files if item.name.endswith(_WEIGHTS))
    place = _config(located)
    short = None if place is None else _shortened(json.loads(Path(place.file.path).read_text(encoding="utf-8")))
    if weights < LEAST_WEIGHT_BYTES or place is None or short is None:
        return None
    linked(tuple(item for item in located.files if item is not place), folder)
    written = folder / place.name
    written.write_text(json.dumps(short), encoding="utf-8")
    copied = tuple(input_file(folder / item.name, item.name) for item in located.files)
    return replace(located, directory=folder, files=copied)


def _config(located: Located) -> InputFile | None:
    """Give the transformer's configuration, which sentence-transformers may keep in the first module's folder."""
    named = {item.name: item for item in located.files}
    if not located.is_sentence_transformers:
        return named.get(_CONFIG)
    modules = json.loads(Path(named[_MODULES].file.path).read_text(encoding="utf-8"))
    folder = str(modules[0].get("path", "")) if modules else ""
    return named.get(f"{folder}/{_CONFIG}" if folder else _CONFIG)


def _shortened(config: dict[str, Any]) -> dict[str, Any] | None:
    """Give a configuration of one layer, with the first entry of lists that have one for each; None for one already."""
    counts = [key for key in _COUNTS if isinstance(config.get(key), int) and config[key] > 1]
    if not counts:
        return None
    count = config[counts[0]]
    short = {
        key: value[:1] if isinstance(value, list) and len(value) == count else value for key, value in config.items()
    }
    return short | dict.fromkeys(counts, 1)
