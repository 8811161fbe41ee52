"""Refuse sentence-transformers modules that no graph of tokens can hold, each with a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TABLE = "StaticEmbedding"  # a table of token vectors instead of an encoder
# Modules that a bundle can hold. Each keeps its own files there, so that sentence-transformers opens the bundle.
_SUPPORTED = ("Transformer", TABLE, "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_ROUTERS = ("Router", "Asym")
_SENTENCE = "sentence_embedding"


def require_supported(model: SentenceTransformer, directory: Path, name: str) -> None:
    """Refuse modules, routes, prompts, chat templates and activations that a bundle's one graph cannot hold.

    Args:
        model: as its loader gave it.
        directory: of its files.
        name: for messages.

    Raises:
        Unsupported: the model has one of them.
        ConfigError: the configuration of a module is no JSON object.
    """
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


def refuse_decoder(model: SentenceTransformer, name: str) -> None:
    """Refuse an encoder-decoder model: its token vectors are the decoder's, of the text that it would generate.

    Raises:
        Unsupported: the model has a decoder.
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
    """Refuse an activation outside torch, for which sentence-transformers silently uses Tanh, with only a warning."""
    try:
        wanted = json.loads(path.read_text(encoding="utf-8")).get("activation_function", "torch.")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"{path}: no JSON object ({error}); restore it from the model's origin") from error
    if not str(wanted).startswith("torch."):
        raise Unsupported(
            f"{path}: activation_function is {wanted}; only classes of torch are loaded without running the model's "
            "own code. Name the class of torch.nn that does the same."
        )
