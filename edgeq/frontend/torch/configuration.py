"""Write what a bundle carries beside the graph of a torch model: its tokenizer, and files for sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.errors import Unsupported
from edgeq.frontend import tokenizer_config
from edgeq.frontend.torch import sentence_transformers, text_towers
from edgeq.frontend.torch.load import pooling_width
from edgeq.frontend.torch.supported_modules import kind_of
from edgeq.frontend.torch.trace import quiet
from edgeq.records import Source

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

_FLAGS = {  # mode -> the end of its flag's name
    "cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens",
}  # fmt: skip
# The order in which sentence-transformers concatenates the modes of several flags.
_FLAG_ORDER = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def write_configuration(model: SentenceTransformer, folder: Path, source: Source) -> None:
    """Write tokenizer, config and module files, without the transformer's weights (a Dense module keeps its own).

    Module files have the format that sentence-transformers 5 and 6 both read: 5 knows neither 6's class paths nor its
    shorter pooling configuration. For a StaticEmbedding the tokenizer alone is written, because sentence-transformers
    would load the table of embeddings with torch. Of a model with code of its own tokenizer and config are written
    without that code, and no module files, because sentence-transformers would ask for it.

    Args:
        model: as `load_model` gives it.
        folder: does not exist yet.
        source: the record, with the lengths of queries and documents, and the model's own code.

    Raises:
        Unsupported: its tokenizer has no tokenizer.json.
    """
    folder.mkdir()
    if sentence_transformers.is_static(model):
        text_tokenizer = model.tokenizer.backend_tokenizer
        _write_json(folder / "tokenizer.json", json.loads(text_tokenizer.to_str()) | {"post_processor": None})
        return
    if source.code:
        _write_without_code(model, folder)
        return
    with quiet():
        model.save(str(folder), create_model_card=False)
    for pattern in ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin"):
        for path in folder.glob(pattern):
            path.unlink()
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for entry, module in zip(modules, model, strict=True):
        kind = kind_of(module)
        entry["type"] = f"sentence_transformers.models.{'Dense' if kind == 'Truncate' else kind}"
        if kind == "Pooling":
            _write_json(folder / entry["path"] / "config.json", pooling_config(module))
    _write_json(folder / "modules.json", modules)
    _mend_tokenizer(model, folder)
    lengths = {"query_length": source.query_length, "document_length": source.document_length}
    told = {key: length for key, length in lengths.items() if length is not None}  # unknown to sentence-transformers 5
    limit = {"max_seq_length": model.max_seq_length, "do_lower_case": False}
    _write_json(folder / "sentence_bert_config.json", limit | told)
    text_towers.trim_saved(model[0], folder)


def _mend_tokenizer(model: SentenceTransformer, folder: Path) -> None:
    """Correct what the saved tokenizer says of padding and truncation."""
    tokenizer_config.mend(folder / tokenizer_config.FILE)
    text_tokenizer, side = model.tokenizer.backend_tokenizer, model.tokenizer.truncation_side
    if side != (text_tokenizer.truncation or {}).get("direction", "right"):  # what tokenizer.json says by itself
        text_tokenizer.enable_truncation(model.max_seq_length, direction=side)
        _write_json(folder / "tokenizer.json", json.loads(text_tokenizer.to_str()))


def _write_without_code(model: SentenceTransformer, folder: Path) -> None:
    """Save tokenizer and config of a model with code of its own; delete the code, and what names it.

    Raises:
        Unsupported: its tokenizer has no tokenizer.json.
    """
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    with quiet():
        for part in (model.tokenizer, config):
            if part is not None:
                part.save_pretrained(str(folder))
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in folder.glob("*.json"):
        said = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(said, dict) and said.pop("auto_map", None) is not None:
            _write_json(path, said)
    if not (folder / "tokenizer.json").is_file():
        raise Unsupported(
            f"{type(model.tokenizer).__name__}: the model's tokenizer computes in its own Python code and has no "
            "tokenizer.json, which every bundle needs. Convert it to a tokenizer of `tokenizers`."
        )
    _mend_tokenizer(model, folder)


def pooling_config(module: torch.nn.Module) -> dict[str, object]:
    """Give a Pooling module's configuration: a flag for each mode, and the modes' order where flags would lose it."""
    modes = sentence_transformers.modes(module)
    flags: dict[str, object] = {f"pooling_mode_{key}": name in modes for name, key in _FLAGS.items()}
    order = {} if list(modes) == [name for name in _FLAG_ORDER if name in modes] else {"pooling_mode": list(modes)}
    rest = {"include_prompt": getattr(module, "include_prompt", True), **order}
    return {"word_embedding_dimension": pooling_width(module), **flags, **rest}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
