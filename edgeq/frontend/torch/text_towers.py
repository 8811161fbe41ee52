"""Split the text tower of a model of texts and images into token vectors, Pooling and Dense.

Such a tower gives one vector for each text: the last token's vector times a projection matrix. The matrix, and whether
padding counts as text, are found by running the tower, not by the name of its architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.errors import Unsupported

if TYPE_CHECKING:
    import torch

TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"
TOWER = "Transformer:text tower"  # the beginning of such an encoder's name in a source record
_PADDED = ", padded to "
_SAME = 1e-4  # of the largest value: float rounding, with another order of summation in a padded batch
_COUNTS = (1, 2, 5, 200)  # words of the texts; the last text is cut


def split_tower(body: Any, name: str) -> list[torch.nn.Module]:
    """Give the modules of a tower: the encoder, last-token Pooling, and the projection as a Dense.

    Args:
        body: sentence-transformers' Transformer of a model of several towers; it is changed where it is split.
        name: for messages.

    Returns:
        The body alone where it gives token vectors, or where its vectors are no product of the last token's.

    Raises:
        Unsupported: padding changes its vectors although its tokenizer gives an attention mask.
    """
    from sentence_transformers.sentence_transformer import modules

    method = body.modality_config.get("text", {}).get("method")
    if body.module_output_name != _SENTENCE or method is None:
        return [body]
    limit = min(longest(body.model) or body.max_seq_length, body.max_seq_length)
    pads = _padding_counts(body, method, name)
    found = _matrix(body, method, limit, pads)
    if found is None:
        return [body]
    body.modality_config = {"text": {"method": method, "method_output_name": "last_hidden_state"}}
    body.module_output_name = TOKENS
    body.padded_to = limit if pads else 0
    rows, columns = found.weight.shape
    dense = modules.Dense(columns, rows, bias=found.bias is not None, activation_function=_identity())
    dense.linear = found
    return [body, modules.Pooling(columns, pooling_mode="lasttoken"), dense]


def longest(encoder: Any) -> int | None:
    """Give the number of text positions of a model of several towers, or None for any other model."""
    config = encoder.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) if config is not encoder.config else None
    return int(found) if found is not None else None


def named(body: Any) -> str | None:
    """Name a split tower as a source record does; give None for any other encoder."""
    length = getattr(body, "padded_to", None)
    return None if length is None else f"{TOWER}{_PADDED}{length}" if length else TOWER


def padded_to(modules: tuple[str, ...]) -> int:
    """Give the length to which a source's texts are padded because padding counts as text; 0 where it does not."""
    return int(modules[0].rpartition(_PADDED)[2]) if _PADDED in modules[0] else 0


def trim_saved(body: Any, folder: Path) -> None:
    """Delete all saved files of a model of several towers but the tokenizer's; keep those of any other model.

    sentence-transformers would ask for the other tower's files. Where padding counts as text, write that into
    `tokenizer_config.json`.
    """
    if longest(body.model) is None:
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder's content before the folder
        if path.is_dir():
            path.rmdir()
        elif not path.name.startswith("tokenizer"):
            path.unlink()
    length = getattr(body, "padded_to", 0)
    if length:
        path = folder / "tokenizer_config.json"
        said = {"padding": "max_length", "max_length": length, "model_input_names": ["input_ids"]}
        whole = json.loads(path.read_text(encoding="utf-8")) | said
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _identity() -> torch.nn.Module:
    import torch

    return torch.nn.Identity()


def _padding_counts(body: Any, method: str, name: str) -> bool:
    """Tell whether padding changes a text's vector although the attention mask excludes it.

    Raises:
        Unsupported: it does, and the model's own tokenizer gives a mask.
    """
    import torch

    ids = torch.tensor([[1, 2, 3, 4]])
    padded = torch.nn.functional.pad(ids, (0, 3), value=body.tokenizer.pad_token_id or 0)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    alone, among = _run(body, method, ids, torch.ones_like(ids))[1], _run(body, method, padded, mask)[1]
    if _are_same(alone, among):
        return False
    if "attention_mask" in body.tokenizer.model_input_names:
        raise Unsupported(
            f"{name}: padding moves a text's vector although a mask says what is padding, and its tokenizer gives one: "
            "the vector would depend on the other texts of its batch. If the model was trained on texts padded to its "
            'longest without a mask, say so: "model_input_names": ["input_ids"] in tokenizer_config.json.'
        )
    return True


def _matrix(body: Any, method: str, limit: int, pads: bool) -> torch.nn.Linear | None:
    """Find the Linear from the last token's vector to the tower's vector, by running texts of the tokenizer's words."""
    import torch

    tokenizer = body.tokenizer
    words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens][:50]
    if not words:
        return None
    options = {"padding": "max_length"} if pads else {}
    runs = []
    for count in _COUNTS:
        text = " ".join((words * count)[:count])
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt", **options)["input_ids"]
        hidden, vector = _run(body, method, ids, torch.ones_like(ids))
        runs.append((hidden[:, -1], vector))
    tokens, vectors = (torch.cat(list(part)) for part in zip(*runs, strict=True))
    wanted = (vectors.shape[1], tokens.shape[1])
    for module in body.model.modules():
        if isinstance(module, torch.nn.Linear) and tuple(module.weight.shape) == wanted:
            with torch.no_grad():
                if _are_same(module(tokens), vectors):
                    return module
    return None


def _run(body: Any, method: str, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the tower; give the token vectors and the pooled vector."""
    import torch

    with torch.no_grad():
        found = getattr(body.model, method)(input_ids=ids, attention_mask=mask, return_dict=True)
    return found.last_hidden_state, found.pooler_output


def _are_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    error = float(np.abs(first.numpy() - second.numpy()).max())
    return error <= _SAME * max(1.0, float(second.abs().max()))
