"""Bring a loaded sentence-transformers model into the form that one graph of tokens can hold, or say why it cannot.

Every module stays a module, so that the graph, the record of the source and the bundle's own module files are made
from one list and give the same vectors.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.torch import text_towers

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

TABLE = "StaticEmbedding"  # a table of tokens in place of an encoder; its files cannot run through ONNX
# What a bundle can hold. Each keeps its own files there, so that sentence-transformers opens it.
_SUPPORTED = ("Transformer", TABLE, "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_ROUTERS = ("Router", "Asym")
LONGEST = 8192  # tokens of a text, where a model states no limit
_LARGEST_LIMIT = 1_000_000  # above, a tokenizer's limit stands for none
_TRUNCATE = "Truncate:"  # begins the name of a truncation among a source's modules
_SAME_VECTOR = 1e-3  # relative: how far padding may move a text's vector where a model is given no mask
_SENTENCE = "sentence_embedding"


def make_traceable(model: SentenceTransformer, directory: Path, name: str, dim: int | None) -> None:
    """Refuse what no graph can hold, and write the rest so that one can; the vectors stay those of single texts.

    A static table becomes a lookup and a mean. A truncation becomes a module, in front of the final Normalize where
    `dim` asks for one, at the very end where the model's own configuration does. Padding moves to the right and comes
    with a mask, because a text's tokens stand at their own positions then.

    Args:
        model: as its loader gave it; changed.
        directory: of its files.
        name: for messages.
        dim: what `--dim` asks for.

    Raises:
        Unsupported: a module has no form in a graph.
        ConfigError: `dim` does not fit the model.
    """
    _require_supported(model, directory, name)
    _refuse_decoder(model, name)
    _unfold_table(model)
    own, model.truncate_dim = model.truncate_dim, None
    if dim is not None:
        _insert_truncation(model, dim, _place_of_truncation(model, name), name)
    elif own is not None and own < _width(model):
        _insert_truncation(model, own, len(model), name)
    model.tokenizer.padding_side = "right"
    model.max_seq_length = _usable_tokens(model)


def names(model: SentenceTransformer) -> tuple[str, ...]:
    """Name the modules of a prepared model, with the modes of pooling and the width that is cut off."""
    found = []
    for module in model:
        name = type(module).__name__
        if hasattr(module, "pooling_mode"):
            name = f"{name}:{'+'.join(modes(module))}"
        name = text_towers.named(module) or name
        found.append(f"{_TRUNCATE}{module.out_features} of {module.in_features}" if name == "Truncate" else name)
    return tuple(found)


def truncated_to(modules: tuple[str, ...]) -> int | None:
    """Give the dimensions that a source's modules are cut to, or None."""
    found = next((name for name in modules if name.startswith(_TRUNCATE)), None)
    return int(found.removeprefix(_TRUNCATE).split()[0]) if found is not None else None


def modes(module: object) -> tuple[str, ...]:
    """Give the modes of a Pooling module, in the order in which their vectors are concatenated.

    Raises:
        Unsupported: it states none.
    """
    mode = getattr(module, "pooling_mode", None)
    if isinstance(mode, str):
        return (mode,)
    if isinstance(mode, tuple | list) and mode:
        return tuple(str(item) for item in mode)
    raise Unsupported(f"the Pooling module states no mode but {mode!r}; sentence-transformers 6 is needed")


def is_static(model: SentenceTransformer) -> bool:
    """Tell whether a table of tokens stands in for an encoder."""
    return type(model[0]).__name__ == TABLE


def depends_on_padding(vectors: list[NDArray[np.float32]]) -> bool:
    """Tell whether the first text, alone and padded among others, float32[batch, dim] each, has two vectors."""
    alone, padded = (item[0] for item in vectors)
    return not float(np.abs(alone - padded).max()) <= _SAME_VECTOR * max(1.0, float(np.abs(alone).max()))


def takes_mask(model: SentenceTransformer) -> bool:
    """Tell whether the encoder has an input for the attention mask."""
    known = getattr(model[0], "model_forward_params", None)
    return is_static(model) or known is None or "attention_mask" in known


def _require_supported(model: SentenceTransformer, directory: Path, name: str) -> None:
    has_prompts = any(model.prompts.values())
    for position, module in enumerate(model):
        kind = type(module).__name__
        if kind in _ROUTERS:
            routes = ", ".join(getattr(module, "sub_modules", {})) or "its routes"
            raise Unsupported(
                f"{name}: {kind} sends texts through different modules ({routes}), and a bundle holds one graph. "
                "Save each route as a model of its own, SentenceTransformer(modules=[*model[0].sub_modules[ROUTE], "
                "*model[1:]]).save(...), and export each."
            )
        if kind not in _SUPPORTED:
            raise Unsupported(
                f"{name}: module {position} is {kind}; a bundle can hold {', '.join(_SUPPORTED)}. "
                "Leave the module out, or write what it does with those."
            )
        if kind == "Pooling" and has_prompts and not getattr(module, "include_prompt", True):
            raise Unsupported(
                f"{name}: its pooling leaves the prompt out (include_prompt is false), which needs the "
                "prompt's length at run time; set include_prompt to true in 1_Pooling/config.json if that will do"
            )
        for key in ("module_input_name", "module_output_name"):
            if getattr(module, key, _SENTENCE) not in (_SENTENCE, "token_embeddings"):
                raise Unsupported(f"{name}: module {position} ({kind}) has {key} {getattr(module, key)!r}; "
                                  f"{_SENTENCE} or token_embeddings is needed.")  # fmt: skip
    if (directory / "modules.json").is_file() and "message" in getattr(model[0], "modality_config", {}):
        raise Unsupported(
            f"{name}: its texts go through a chat template, which a tokenizer.json does not hold. Take the message "
            "modality out of sentence_bert_config.json if plain texts will do."
        )
    for path in sorted(directory.glob("*/config.json")):
        _require_torch_activation(path)


def _refuse_decoder(model: SentenceTransformer, name: str) -> None:
    """Refuse an encoder with a decoder behind it, whose tokens' vectors are those of the text that it would write.

    Raises:
        Unsupported: it is so.
    """
    encoder = getattr(model[0], "auto_model", None)
    parts = [getattr(encoder, part, None) for part in ("encoder", "decoder")]
    if all(part is not None for part in parts):
        raise Unsupported(
            f"{name}: {type(encoder).__name__} has a decoder behind its encoder, which writes texts and embeds none, "
            "for no backend. Export its encoder as a module: edgeq.export(AutoModel.from_pretrained(DIRECTORY)"
            '.get_encoder(), targets=[...], tokenizer=DIRECTORY, pooling="mean", out=OUT).'
        )


def _require_torch_activation(path: Path) -> None:
    """Refuse an activation that sentence-transformers does not load: it takes Tanh instead, with a mere warning."""
    try:
        wanted = json.loads(path.read_text(encoding="utf-8")).get("activation_function", "torch.")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{path}: no JSON object ({error}); restore it from the model's origin") from error
    if not str(wanted).startswith("torch."):
        raise Unsupported(
            f"{path}: activation_function is {wanted}; only classes of torch are loaded without running the model's "
            "own code. Name the class of torch.nn that does the same."
        )


def _unfold_table(model: SentenceTransformer) -> None:
    """Turn a bag of embeddings into a lookup and a mean, which know padding.

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
        """Look tokens up."""

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


def _place_of_truncation(model: SentenceTransformer, name: str) -> int:
    """Give where a truncation stands: in front of the final Normalize, which then restores unit length.

    Raises:
        ConfigError: a Dense or LayerNorm stands behind a Normalize.
    """
    kinds = [type(module).__name__ for module in model]
    place = len(kinds)
    while place and kinds[place - 1] in ("Normalize", "Dropout"):
        place -= 1
    if "Normalize" in kinds[:place]:
        raise ConfigError(
            f"{name}: --dim cuts off the end of a vector and restores its unit length, but here "
            f"{kinds[place - 1]} stands behind Normalize, and the vectors have none. Leave --dim out."
        )
    return place


def _insert_truncation(model: SentenceTransformer, dim: int, place: int, name: str) -> None:
    """Insert a module that keeps the first `dim` numbers.

    It is a Dense of ones and zeros for sentence-transformers, any version of which then gives the same vectors, and a
    slice in the graph.
    """
    import torch
    from sentence_transformers.sentence_transformer import modules

    class Truncate(modules.Dense):
        """Keep the first numbers of a vector."""

        def forward(self, features: dict[str, torch.Tensor | Any], **kwargs: Any) -> dict[str, torch.Tensor | Any]:
            features[_SENTENCE] = features[_SENTENCE][:, : self.out_features]
            return features

    width = _width(model)
    if dim > width:
        raise ConfigError(f"{name}: --dim is {dim}; the model's vectors have {width} dimensions. Give fewer.")
    if dim == width:
        return
    cut = Truncate(width, dim, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(dim, width))
    _replace_modules(model, [*list(model)[:place], cut.eval(), *list(model)[place:]])


def _replace_modules(model: SentenceTransformer, modules: list[torch.nn.Module]) -> None:
    model.module_kwargs = None  # arguments of `encode` for single modules, by name: a graph has none
    model._modules = OrderedDict((str(position), module) for position, module in enumerate(modules))


def _width(model: SentenceTransformer) -> int:
    dim = model.get_embedding_dimension()
    if dim is None:
        raise Unsupported("the model does not state its dimension; its last Pooling or Dense should")
    return int(dim)


def _usable_tokens(model: SentenceTransformer) -> int:
    """Give how many tokens the model takes: its limit, but no more than it has positions for.

    A table of positions whose first rows belong to padding holds fewer than it has rows.
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
