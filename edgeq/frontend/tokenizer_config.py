"""Make a bundle's tokenizer_config.json mean the same to every version of transformers."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "tokenizer_config.json"


def mend(path: Path) -> None:
    """Set a tokenizer class that every version of transformers knows, an attention mask, and padding on the right.

    Args:
        path: of the file, which is rewritten where these settings differ.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    changes: dict[str, object] = {}
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, which 4 does not know
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    inputs = config.get("model_input_names", ["attention_mask"])
    if "attention_mask" not in inputs:
        changes["model_input_names"] = [*inputs, "attention_mask"]
    if config.get("padding_side", "right") != "right":  # so that a token has the same position as in the text alone
        changes["padding_side"] = "right"
    if changes:
        path.write_text(json.dumps(config | changes, indent=2) + "\n", encoding="utf-8")
