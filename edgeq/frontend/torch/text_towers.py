"""Write a text tower that pools by itself as token vectors, a pooling and a Dense, as an encoder of texts alone has.

Towers of texts, as those beside towers of images, give one vector for each text: a token's vector times a matrix. Which
token, which matrix, and whether padding counts as text are found by running the tower, not by its name.
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
TOWER = "Transformer:text tower"  # begins the name of such an encoder among a source's modules
_PADDED = ", padded to "
_SAME = 1e-4  # of the largest value: float rounding, and the other order of summing in a padded batch
_COUNTS = (1, 2, 5, 200)  # words of a text; the last is cut


def unfolded(body: Any, name: str) -> list[torch.nn.Module]:
    """Give the modules of a tower: tokens to vectors, the last token's, and the matrix behind it.

    Args:
        body: sentence-transformers' Transformer of a model of several towers; changed where it is taken apart.
        name: for messages.

    Returns:
        The body alone where it gives token vectors, or where its pooling is none that is known.

    Raises:
        Unsupported: padding moves its vectors, and its tokenizer gives a mask that would say so.
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
    """Give how many positions of texts a model of several towers has, or None."""
    config = encoder.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) if config is not encoder.config else None
    return int(found) if found is not None else None


def named(body: Any) -> str | None:
    """Name a tower among a source's modules; None where the encoder is none that was taken apart."""
    length = getattr(body, "padded_to", None)
    return None if length is None else f"{TOWER}{_PADDED}{length}" if length else TOWER


def padded_to(modules: tuple[str, ...]) -> int:
    """Give how long a source's modules want texts to be, made so with tokens that pad; 0 where padding is no text."""
    return int(modules[0].rpartition(_PADDED)[2]) if _PADDED in modules[0] else 0


def trim_saved(body: Any, folder: Path) -> None:
    """Leave of a saved model of several towers its tokenizer, and of any other model everything.

    sentence-transformers would ask for the other tower's files. Where padding counts as text,
    `tokenizer_config.json` says so.
    """
    if longest(body.model) is None:
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
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
    """Tell whether a padded text has another vector than the text alone, though a mask says what is padding.

    Raises:
        Unsupported: it has, and the model's own tokenizer gives a mask.
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
    """Find the Linear that makes the tower's vectors of the last token's, on texts of the tokenizer's own words."""
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
    """Give token vectors and the vector that the tower makes of them."""
    import torch

    with torch.no_grad():
        found = getattr(body.model, method)(input_ids=ids, attention_mask=mask, return_dict=True)
    return found.last_hidden_state, found.pooler_output


def _are_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    error = float(np.abs(first.numpy() - second.numpy()).max())
    return error <= _SAME * max(1.0, float(second.abs().max()))
