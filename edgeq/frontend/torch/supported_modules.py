"""Refuse sentence-transformers modules that no graph of tokens can hold, each with a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.model_kind import OWN_MODULES, SUPPORTED, TASKS, Entry, listed_modules

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TABLE = "StaticEmbedding"  # a table of token vectors instead of an encoder
_ENCODERS = ("Transformer", TABLE)
_ROUTERS = ("Router", "Asym")
_SENTENCE = "sentence_embedding"
_OWN_CODE = "transformers_modules"  # the package under which transformers imports a model's own code


def kind_of(module: object) -> str:
    """Name a module by its class; of the model's own code by FILE.CLASS, so that it is taken for no other."""
    package, _, file = type(module).__module__.rpartition(".")
    return f"{file}.{type(module).__name__}" if package.startswith(_OWN_CODE) else type(module).__name__


def require_listed(model: SentenceTransformer, directory: Path) -> None:
    """Compare the modules that were loaded with modules.json, one by one: their number, order and classes.

    Args:
        model: as sentence-transformers loaded it, unchanged.
        directory: of its files.

    Raises:
        Unsupported: a module that is listed was not loaded, or in another class.
    """
    listed = listed_modules(directory)
    loaded = list(model)
    for position, entry in enumerate(listed):
        found = loaded[position] if position < len(loaded) else None
        if found is None or not _is_of(found, entry):
            raise Unsupported(
                f"{directory / 'modules.json'}: module {position} ({entry.path or '.'}) is {entry.type}, and "
                f"sentence-transformers loaded {'nothing' if found is None else kind_of(found)} in its place: the "
                "vectors would be another model's. Use the version of sentence-transformers that saved the model."
            )
    if len(loaded) > len(listed):
        raise Unsupported(
            f"{directory / 'modules.json'}: lists {len(listed)} modules, and sentence-transformers loaded "
            f"{', '.join(map(kind_of, loaded))}. Use the version of sentence-transformers that saved the model."
        )


def _is_of(module: object, entry: Entry) -> bool:
    """Tell whether a loaded module is of the class that modules.json names."""
    if not entry.type.startswith(OWN_MODULES):
        return kind_of(module) == entry.type.rpartition("--")[2]
    from sentence_transformers.util import import_from_string

    return type(module) is import_from_string(entry.type)


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
        kind = kind_of(module)
        if kind in _ROUTERS:
            routes = ", ".join(getattr(module, "sub_modules", {})) or "its routes"
            raise Unsupported(
                f"{name}: {kind} sends texts through different modules ({routes}), and a bundle holds one graph. "
                "Save each route as a model of its own, SentenceTransformer(modules=[*model[0].sub_modules[ROUTE], "
                "*model[1:]]).save(...), and export each."
            )
        if kind not in SUPPORTED and "." not in kind:
            raise Unsupported(
                f"{name}: module {position} is {kind}; a bundle can hold {', '.join(SUPPORTED)}. "
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
    _require_vectors_of_texts(model, name)
    for entry in listed_modules(directory):
        path = directory / entry.path / "config.json"
        if entry.type.startswith(OWN_MODULES) and entry.kind == "Dense" and path.is_file():
            _require_torch_activation(path)


def _require_vectors_of_texts(model: SentenceTransformer, name: str) -> None:
    """Refuse an encoder with the head of another task, and modules that never make one vector of the token vectors.

    Raises:
        Unsupported: it is so.
    """
    first = model[0]
    task = getattr(first, "transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise Unsupported(
            f"{name}: its Transformer is loaded for {task}: it {TASKS.get(str(task), 'does another task')}. A model "
            "whose encoder gives token vectors (feature-extraction) is needed."
        )
    kinds = [kind_of(module) for module in model]
    encoders = [position for position, kind in enumerate(kinds) if kind in _ENCODERS]
    if encoders not in ([0], []) or not hasattr(first, "tokenizer"):
        raise Unsupported(
            f"{name}: its modules are {', '.join(kinds)}; one encoder with a tokenizer is needed, at their beginning. "
            "Restore modules.json from the model's origin."
        )
    pools = "Pooling" in kinds or kinds[0] == TABLE or any("." in kind for kind in kinds)
    if not pools and getattr(first, "module_output_name", "token_embeddings") != _SENTENCE:
        raise Unsupported(
            f"{name}: its modules ({', '.join(kinds)}) give a vector for each token, as late interaction wants them, "
            "and no Pooling makes them one vector of the text. Bundles hold models of one vector a text."
        )


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
