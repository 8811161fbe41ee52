"""Write into a bundle's configuration files what other libraries need to give the vectors that were validated.

Every file that limits a text's tokens states the one limit that parity was measured with.
Each library that opens a bundle reads the limit from another file: fastembed takes the least of `max_length` and
`model_max_length` of tokenizer_config.json, transformers takes `model_max_length`, the tokenizers
library takes the truncation of tokenizer.json, sentence-transformers takes sentence_bert_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER, TOKENIZER_CONFIG, MODULE_CONFIG = "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"


def state_limit(folder: Path, limit: int) -> None:
    """Write the limit into the configuration files of a folder that have a place for it.

    Padding to a fixed length goes from tokenizer.json, unless the model itself needs it (it reads no mask): another
    limit than the length would leave texts of two lengths in a batch.

    Args:
        folder: of a bundle, with tokenizer.json.
        limit: in tokens, special tokens included.
    """
    config = _read(folder / TOKENIZER_CONFIG)
    pads = config is not None and config.get("padding") == "max_length"  # then `max_length` is what it pads to
    if config is not None:
        lengths = {} if pads or "max_length" not in config else {"max_length": limit}
        _write(folder / TOKENIZER_CONFIG, config, {"model_max_length": limit, **lengths})
    tokenizer = _read(folder / TOKENIZER)
    if tokenizer is not None:
        usual = {"direction": "Right", "max_length": limit, "strategy": "LongestFirst", "stride": 0}
        changes: dict[str, Any] = {"truncation": usual | (tokenizer.get("truncation") or {}) | {"max_length": limit}}
        padding = tokenizer.get("padding")
        if padding is not None and padding.get("strategy") != "BatchLongest" and not pads:
            changes["padding"] = padding | {"strategy": "BatchLongest"}
        _write(folder / TOKENIZER, tokenizer, changes)
    module = _read(folder / MODULE_CONFIG)
    if module is not None:
        _write(folder / MODULE_CONFIG, module, {"max_seq_length": limit})


def state_client_settings(folder: Path, model_args: Mapping[str, object]) -> None:
    """Write the settings with which sentence-transformers opens the artifact as it was validated.

    Both 5 and 6 pass `model_args` of sentence_bert_config.json to the loader of the backend; a caller's win over them.

    Args:
        folder: of a bundle.
        model_args: from a backend with `HasClientSettings`.
    """
    module = _read(folder / MODULE_CONFIG)
    if module is not None:
        _write(folder / MODULE_CONFIG, module, {"model_args": dict(model_args)})


def _read(path: Path) -> dict[str, Any] | None:
    """Read a JSON object, or give None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Write a JSON object with changes, unless it has them."""
    if any(content.get(key, path) != value for key, value in changes.items()):
        text = json.dumps(content | changes, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")
