"""Rewrite a loaded sentence-transformers model so that one graph of token ids and mask can hold it.

Every module stays a module, so that the graph, the source record and the bundle's own module files are made from one
list and give the same vectors.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.torch import text_towers
from edgeq.frontend.torch.supported_modules import TABLE, kind_of

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

LONGEST = 8192  # tokens of a text, where a model states no limit
_LARGEST_LIMIT = 1_000_000  # above, a tokenizer's limit stands for none
_TRUNCATE = "Truncate:"  # begins the name of a truncation among a source's modules
_SAME_VECTOR = 1e-3  # relative: how far padding may move a text's vector where a model is given no mask
_SENTENCE = "sentence_embedding"


def make_traceable(model: SentenceTransformer, name: str, dim: int | None) -> None:
    """Rewrite modules to those that a graph can hold; the vectors of single texts stay the same.

    A StaticEmbedding becomes a lookup and mean pooling. A truncation becomes a module: before the final Normalize where
    `dim` asks for it, at the very end where the model's own configuration does. Padding is moved to the right and gets
    a mask, so that each token has the same position as in the text alone.

    Args:
        model: as sentence-transformers loads it, of modules that are supported; it is changed.
        name: for messages.
        dim: the option `--dim`.

    Raises:
        Unsupported: the model does not state its dimension.
        ConfigError: `dim` is larger than the vectors, or a Dense or LayerNorm follows a Normalize.
    """
    _unfold_table(model)
    own, model.truncate_dim = model.truncate_dim, None
    if dim is not None:
        _insert_truncation(model, dim, _position_of_truncation(model, name), name)
    elif own is not None and own < _width(model):
        _insert_truncation(model, own, len(model), name)
    model.tokenizer.padding_side = "right"
    model.max_seq_length = usable_tokens(model)


def names(model: SentenceTransformer) -> tuple[str, ...]:
    """Name the modules of a model, with the pooling modes and the width of a truncation."""
    found = []
    for module in model:
        name = kind_of(module)
        if hasattr(module, "pooling_mode") and name == "Pooling":
            name = f"{name}:{'+'.join(modes(module))}"
        name = text_towers.named(module) or name
        found.append(f"{_TRUNCATE}{module.out_features} of {module.in_features}" if name == "Truncate" else name)
    return tuple(found)


def truncated_to(modules: tuple[str, ...]) -> int | None:
    """Give the number of dimensions to which a source's modules truncate, or None."""
    found = next((name for name in modules if name.startswith(_TRUNCATE)), None)
    return int(found.removeprefix(_TRUNCATE).split()[0]) if found is not None else None


def modes(module: object) -> tuple[str, ...]:
    """Give the modes of a Pooling module, in the order in which their vectors are concatenated.

    Raises:
        Unsupported: the module states none.
    """
    mode = getattr(module, "pooling_mode", None)
    if isinstance(mode, str):
        return (mode,)
    if isinstance(mode, tuple | list) and mode:
        return tuple(str(item) for item in mode)
    raise Unsupported(f"the Pooling module states no mode but {mode!r}; sentence-transformers 6 is needed")


def is_static(model: SentenceTransformer) -> bool:
    """Tell whether the model is a StaticEmbedding, a table of token vectors instead of an encoder."""
    return kind_of(model[0]) == TABLE


def depends_on_padding(vectors: list[NDArray[np.float32]]) -> bool:
    """Tell whether the first text's vector differs between two batches, float32[batch, dim] each: alone, and padded."""
    alone, padded = (item[0] for item in vectors)
    return not float(np.abs(alone - padded).max()) <= _SAME_VECTOR * max(1.0, float(np.abs(alone).max()))


def takes_mask(model: SentenceTransformer) -> bool:
    """Tell whether the encoder has an input for the attention mask."""
    known = getattr(model[0], "model_forward_params", None)
    return is_static(model) or known is None or "attention_mask" in known


def _unfold_table(model: SentenceTransformer) -> None:
    """Replace EmbeddingBag by Embedding and mean pooling under the attention mask, so that padding does not count.

    Before::

        input_ids (of all texts), offsets ─ EmbeddingBag

    After::

        input_ids ─ Embedding ─ mean under attention_mask
    """
    if not is_static(model):
        return
    import torch
    from sentence_transformers.sentence_transformer import modules
    from transformers import PreTrainedTokenizerFast

    old: Any = model[0]
    text_tokenizer = old.tokenizer
    limit = (text_tokenizer.truncation or {}).get("max_length", LONGEST)
    rows = old.embedding.weight.detach().to(torch.float32)

    class StaticEmbedding(torch.nn.Module):
        """Look up the vectors of tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows)
            self.tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
                tokenizer_object=text_tokenizer, model_max_length=limit
            )
            self.tokenizer.model_input_names = ["input_ids", "attention_mask"]

        @property
        def max_seq_length(self) -> int:
            return int(self.tokenizer.model_max_length)

        @max_seq_length.setter
        def max_seq_length(self, value: int) -> None:
            self.tokenizer.model_max_length = value

        def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            features["token_embeddings"] = self.embedding(features["input_ids"])
            return features

    table = StaticEmbedding()
    mean = modules.Pooling(old.embedding_dim, pooling_mode="mean")
    _replace_modules(model, [table, mean, *list(model)[1:]])


def _position_of_truncation(model: SentenceTransformer, name: str) -> int:
    """Give the position of a truncation: before the final Normalize, which then restores unit length.

    Raises:
        ConfigError: a Dense or LayerNorm follows a Normalize.
    """
    kinds = [kind_of(module) for module in model]
    position = len(kinds)
    while position and kinds[position - 1] in ("Normalize", "Dropout"):
        position -= 1
    if "Normalize" in kinds[:position]:
        raise ConfigError(
            f"{name}: --dim cuts off the end of a vector and restores its unit length, but here "
            f"{kinds[position - 1]} stands behind Normalize, and the vectors have none. Leave --dim out."
        )
    return position


def _insert_truncation(model: SentenceTransformer, dim: int, position: int, name: str) -> None:
    """Insert a module that keeps the first `dim` numbers of a vector.

    For sentence-transformers it is a Dense of ones and zeros, which every version runs with the same result; in the
    graph it is a slice.

    Raises:
        ConfigError: `dim` is larger than the vectors.
    """
    import torch
    from sentence_transformers.sentence_transformer import modules

    class Truncate(modules.Dense):
        """Keep the first numbers of a vector by slicing."""

        def forward(self, features: dict[str, torch.Tensor | Any], **kwargs: Any) -> dict[str, torch.Tensor | Any]:
            features[_SENTENCE] = features[_SENTENCE][:, : self.out_features]
            return features

    width = _width(model)
    if dim > width:
        raise ConfigError(f"{name}: --dim is {dim}; the model's vectors have {width} dimensions. Give fewer.")
    if dim == width:
        return
    cut = Truncate(width, dim, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(dim, width))
    _replace_modules(model, [*list(model)[:position], cut.eval(), *list(model)[position:]])


def _replace_modules(model: SentenceTransformer, modules: list[torch.nn.Module]) -> None:
    model.module_kwargs = None  # arguments of `encode` for single modules; a graph has none
    model._modules = OrderedDict((str(position), module) for position, module in enumerate(modules))


def _width(model: SentenceTransformer) -> int:
    dim = model.get_embedding_dimension()
    if dim is None:
        raise Unsupported("the model does not state its dimension; its last Pooling or Dense should")
    return int(dim)


def usable_tokens(model: SentenceTransformer) -> int:
    """Give the most tokens of a text: the model's limit, or its number of positions where that is smaller.

    A table of positions whose first rows belong to padding has fewer positions than rows.
    """
    stated = model.max_seq_length or LONGEST
    limit = stated if stated < _LARGEST_LIMIT else LONGEST
    encoder = getattr(model[0], "auto_model", None)
    if encoder is None:
        return int(limit)
    tower = text_towers.longest(encoder)
    if tower is not None:
        return min(int(limit), tower)
    rows = getattr(encoder.config, "max_position_embeddings", None)
    words = encoder.get_input_embeddings()
    for table in encoder.modules():
        padding = getattr(table, "padding_idx", None)
        if table is not words and padding is not None and getattr(table, "num_embeddings", None) == rows:
            limit = min(limit, table.num_embeddings - padding - 1)
    return int(limit)
