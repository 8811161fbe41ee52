"""Run sentence-transformers' own `encode`, `encode_query` and `encode_document`, and note token ids and FP32 vectors.

The model runs as sentence-transformers loads it, before anything is rewritten: what a bundle gives is compared with it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.data import end_to_end
from edgeq.data.end_to_end import OwnPath
from edgeq.data.text_input import METHODS, Method
from edgeq.frontend import settings
from edgeq.frontend.locate import Located
from edgeq.frontend.torch import sentence_transformers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

IDS, VECTORS = "own_path.json", "own_path.npz"
_LONGEST_VECTOR = 512  # tokens; of longer texts the ids are compared alone, which takes no time
_LONG, _LONG_VECTORS = 128, 1  # of so many texts of more than so many tokens vectors are made
_ALWAYS = 4  # texts whose vectors are made by each method, even where the ids are those of encode
FloatArray = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
Vectors = dict[Method, dict[int, FloatArray]]  # by the position of the text


class _OnlyIds(Exception):
    """Stop a run whose token ids are enough."""


def of_model(model: SentenceTransformer, located: Located) -> tuple[OwnPath, Arrays]:
    """Run a model of texts as sentence-transformers loads it; its own limit is lowered where it states too much.

    sentence-transformers fails on a text of more tokens than the model has positions. Where the model states more, or
    no limit at all, texts are cut where a bundle cuts them.
    """
    if sentence_transformers.is_static(model):
        truncation: Any = model.tokenizer.truncation
        return _run(model, None if truncation is None else int(truncation["max_length"]), located.dim)
    stated = settings.read(located.directory).max_length
    limit = sentence_transformers.usable_tokens(model)
    if model.max_seq_length is None or model.max_seq_length > limit:
        model.max_seq_length = limit
    return _run(model, limit if stated is None else min(stated, limit), located.dim)


def of_tokenizer(model: SentenceTransformer) -> tuple[OwnPath, Arrays]:
    """Run the tokenizer alone of a model that is no sentence-transformers directory."""
    return _tokenizer_ids(model.tokenizer, int(model.max_seq_length or 0), getattr(model[0], "padded_to", 0)), {}


def _run(model: SentenceTransformer, limit: int | None, dim: int | None) -> tuple[OwnPath, Arrays]:
    """Run the three methods on each text of the list, alone.

    Args:
        model: as sentence-transformers loads it.
        limit: the most tokens of a text, where texts are cut.
        dim: cut vectors to so many dimensions, as `--dim` does.

    Returns:
        The ids, and the vectors as arrays: `METHOD_rows`, int64[n], positions of texts; `METHOD_vectors`,
        float32[n, dim].
    """
    import torch

    has_unit_length = any(type(module).__name__ == "Normalize" for module in model)
    options = {"truncate_dim": dim, "normalize_embeddings": has_unit_length} if dim is not None else {}
    texts: list[str] = []
    ids: dict[Method, list[tuple[int, ...]]] = {method: [] for method in METHODS}
    vectors: dict[Method, dict[int, FloatArray]] = {method: {} for method in METHODS}
    left_out: list[str] = []
    long_vectors = 0
    given = end_to_end.texts(limit)
    threads = torch.get_num_threads()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # each long text would be told
    torch.set_num_threads(1)  # single short texts: two threads would wait for each other longer than they compute
    for text in given:
        found: dict[Method, tuple[tuple[int, ...], FloatArray | None]] = {}
        try:
            for method in METHODS:
                known = found["encode"][0] if method != "encode" and len(texts) >= _ALWAYS else None
                longest = _LONGEST_VECTOR if long_vectors < _LONG_VECTORS else _LONG
                found[method] = _run_one(model, method, text, known, longest, options)
        except Exception as error:  # the boundary to the model's own code, which may refuse a text
            left_out.append(f"{text[:20]!r} ({_told(error)})")
            continue
        for method, (own, vector) in found.items():
            ids[method].append(own)
            long_vectors += vector is not None and len(own) > _LONG
            if vector is not None and np.isfinite(vector).all():
                vectors[method][len(texts)] = vector
        texts.append(text)
    torch.set_num_threads(threads)
    name = f"sentence-transformers {version('sentence-transformers')}"
    reason = f"{name} itself fails on {len(left_out)} of {len(given)} texts: {left_out[0]}" if left_out else None
    if 2 * len(texts) < len(given):
        return end_to_end.without(reason or ""), {}
    arrays: Arrays = {}
    for method, made in vectors.items():
        arrays[f"{method}_rows"] = np.array(sorted(made), np.int64)
        arrays[f"{method}_vectors"] = np.array([made[row] for row in sorted(made)], np.float32)
    own_path = OwnPath(
        against=name, reason=reason, texts=tuple(texts), has_prompts=True, ids=end_to_end.compressed(ids)
    )
    return own_path, arrays


def _tokenizer_ids(tokenizer: Any, limit: int, padded_to: int = 0) -> OwnPath:
    """Note the ids of transformers' tokenizer alone, for a source that sentence-transformers does not open.

    Args:
        tokenizer: as transformers loads it.
        limit: the most tokens of a text.
        padded_to: texts have so many tokens at least, padding that counts as text among them.
    """
    texts = end_to_end.texts(limit)
    padding = {"padding": "max_length"} if padded_to else {}
    ids = [tuple(tokenizer(text, truncation=True, max_length=limit, **padding)["input_ids"]) for text in texts]
    name = f"transformers {version('transformers')}, its tokenizer alone"
    return OwnPath(against=name, texts=texts, ids=end_to_end.compressed({"encode": ids}))


def write(made: tuple[OwnPath, Arrays], folder: Path) -> None:
    """Write ids and vectors for the process that converts the graph."""
    own, arrays = made
    (folder / IDS).write_text(own.model_dump_json(), encoding="utf-8")
    np.savez(folder / VECTORS, allow_pickle=False, **arrays)


def read(folder: Path) -> tuple[OwnPath, Vectors]:
    """Read what `write` wrote: the ids, and by method and position of the text a vector, float32[dim]."""
    own = OwnPath.model_validate_json((folder / IDS).read_bytes())
    with np.load(folder / VECTORS, allow_pickle=False) as archive:
        vectors: Vectors = {
            method: dict(zip(archive[f"{method}_rows"].tolist(), archive[f"{method}_vectors"], strict=True))
            for method in METHODS
            if f"{method}_rows" in archive
        }
    return own, vectors


def _run_one(
    model: SentenceTransformer,
    method: Method,
    text: str,
    known: tuple[int, ...] | None,
    longest: int,
    options: dict[str, Any],
) -> tuple[tuple[int, ...], FloatArray | None]:
    """Run one method on one text; give its ids, and its vector unless the ids are `known` or more than `longest`."""
    with _watched(model, known, longest) as seen:
        try:
            (vector,) = getattr(model, method)([text], batch_size=1, show_progress_bar=False, **options)
        except _OnlyIds:
            return seen[0], None
    return seen[0], np.asarray(vector, np.float32)


def _told(error: Exception) -> str:
    """Name an error by its class and the beginning of its first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:100]}"


@contextmanager
def _watched(
    model: SentenceTransformer, known: tuple[int, ...] | None, longest: int
) -> Iterator[list[tuple[int, ...]]]:
    """Note the token ids that reach the model's modules, and stop where they are `known` or more than `longest`."""
    seen: list[tuple[int, ...]] = []
    forward = model.forward

    def noted(features: dict[str, Any], **kwargs: Any) -> Any:
        ids, mask = features["input_ids"], features.get("attention_mask")
        row = ids if ids.ndim == 1 else ids[0] if mask is None else ids[0][mask[0].bool()]
        seen.append(tuple(int(item) for item in row))
        if seen[0] == known or len(seen[0]) > longest:
            raise _OnlyIds
        return forward(features, **kwargs)

    model.forward = noted  # type: ignore[method-assign,assignment]
    try:
        yield seen
    finally:
        del model.forward


def main() -> int:
    """Print the ids of transformers' tokenizer of a folder, as JSON: `FOLDER LIMIT` are on the command line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=False)
    sys.stdout.write(_tokenizer_ids(tokenizer, int(sys.argv[2])).model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
