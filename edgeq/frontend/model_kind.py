"""Refuse a directory that is saved as a sparse encoder, a late interaction model, a reranker or a classifier.

The files say so, before torch or sentence-transformers is loaded: sentence-transformers itself would drop the modules
that make such a model what it is, and mean-pool what is left.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.errors import ConfigError, Unsupported

MODULES, SETTINGS, CONFIG = "modules.json", "config_sentence_transformers.json", "config.json"
OWN_MODULES = "sentence_transformers."  # begins the type of a module that sentence-transformers has itself

_TAKEN = "SentenceTransformer"
_SPARSE = "gives each text a weight for every word of its vocabulary or feature of its codebook, and no dense vector"
_LATE = "gives a vector for each token, which late interaction (MaxSim) compares, and none for a text"
_SCORES = "gives scores of pairs or classes, and no vector of a text"
# What `model_type` of config_sentence_transformers.json can be besides -> what such a model gives.
_TYPES = {"SparseEncoder": _SPARSE, "MultiVectorEncoder": _LATE, "ColBERT": _LATE, "CrossEncoder": _SCORES}
# The beginning of a module's type, or its class -> what the model gives.
_PACKAGES = (
    ("sentence_transformers.sparse_encoder.", _SPARSE), ("sentence_transformers.multi_vector_encoder.", _LATE),
    ("sentence_transformers.cross_encoder.", _SCORES), ("pylate.", _LATE),
)  # fmt: skip
_CLASSES = {
    "MLMTransformer": _SPARSE, "SpladePooling": _SPARSE, "SparseAutoEncoder": _SPARSE, "CSRSparsity": _SPARSE,
    "SparseStaticEmbedding": _SPARSE, "IDF": _SPARSE, "MultiVectorMask": _LATE, "TokenPooling": _LATE,
    "LogitScore": _SCORES,
}  # fmt: skip
# Modules that a bundle can hold; each keeps its own files there, so that sentence-transformers opens the bundle.
SUPPORTED = ("Transformer", "StaticEmbedding", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_LATER = ("Router", "Asym", "CLIPModel")  # refused with their routes, or taken for images, once they are loaded
# How transformers names models whose head gives no vector of a text, and the marks of late interaction.
_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice", "ForNextSentencePrediction",
    "ForQuestionAnswering",
)  # fmt: skip
_LATE_CLASSES = ("ColBERT", "ForRetrieval")
# Tasks of sentence-transformers' Transformer besides feature-extraction -> what the model then gives.
TASKS = {
    "fill-mask": "gives a weight for every word of its vocabulary at each token (a masked-LM head)",
    "sequence-classification": _SCORES,
    "text-generation": "writes texts",
    "any-to-any": "writes texts",
    "retrieval": _LATE,
}
_GIVE = "Give a model that was trained for that, and is saved as a SentenceTransformer."


@dataclass(frozen=True)
class Entry:
    """Hold one module that modules.json lists.

    Attributes:
        name: unique among the modules.
        path: of its folder, relative to the model's.
        type: the class, with its package, or with the file of the directory that defines it.
    """

    name: str
    path: str
    type: str

    @property
    def kind(self) -> str:
        """Give the class's bare name."""
        return self.type.rpartition(".")[2]


def refuse_other_kinds(directory: Path) -> None:
    """Refuse a directory that calls itself anything but a SentenceTransformer, or lists modules of another kind.

    Raises:
        Unsupported: the model gives no single dense vector of a text, or no bundle can hold a module.
        ConfigError: a file is no JSON of the form that sentence-transformers writes.
    """
    settings, config = read_object(directory / SETTINGS), read_object(directory / CONFIG)
    classes = config.get("architectures")
    named = [str(name) for name in classes] if isinstance(classes, list) else []
    heads = [name for name in named if name.endswith(_HEADS)]
    kind = settings.get("model_type", _TAKEN)
    if kind == "CrossEncoder" or (heads and kind == _TAKEN and not (directory / MODULES).is_file()):
        raise Unsupported(
            f"{directory}: is saved as {(heads or [kind])[0]}, whose head gives scores of pairs or classes and no "
            "vector of a text, for no backend. Give the embedding model that searches before this one reranks; or, "
            "where the encoder alone is meant, save it: AutoModel.from_pretrained(DIRECTORY).save_pretrained(OTHER)."
        )
    if kind != _TAKEN:
        gives = _TYPES.get(str(kind), f"is not a {_TAKEN}")
        raise Unsupported(
            f"{directory / SETTINGS}: model_type is {json.dumps(kind)}: the model {gives}. Bundles hold models that "
            f"give one dense vector a text, for every backend. {_GIVE}"
        )
    late = next((name for name in named if any(mark in name for mark in _LATE_CLASSES)), None)
    if late is not None:
        raise Unsupported(f"{directory / CONFIG}: architectures names {late}: the model {_LATE}. {_GIVE}")
    for entry in listed_modules(directory):
        gives = next((gives for start, gives in _PACKAGES if entry.type.startswith(start)), "")
        if entry.type.startswith(OWN_MODULES):
            gives = gives or _CLASSES.get(entry.kind, "")
        if gives:
            raise Unsupported(
                f"{directory / MODULES}: module {entry.name} is {entry.type}: the model {gives}. Without that module "
                f"it would be another model. {_GIVE}"
            )
        if entry.type.startswith(OWN_MODULES) and entry.kind not in (*SUPPORTED, *_LATER):
            raise Unsupported(
                f"{directory / MODULES}: module {entry.name} is {entry.type}; a bundle can hold "
                f"{', '.join(SUPPORTED)}. Write what the module does with those."
            )
    for path in sorted({directory, *(directory / entry.path for entry in listed_modules(directory))}):
        task = read_object(path / "sentence_bert_config.json").get("transformer_task", "feature-extraction")
        if task != "feature-extraction":
            gives = TASKS.get(str(task), "does another task")
            raise Unsupported(
                f"{path / 'sentence_bert_config.json'}: transformer_task is {json.dumps(task)}: the model {gives}; "
                f'"feature-extraction" gives token vectors. {_GIVE}'
            )


def refuse_around(file: Path) -> None:
    """Refuse an ONNX file that lies in such a directory, directly or one folder below.

    Raises:
        Unsupported: it does.
        ConfigError: a file is no JSON of the form that sentence-transformers writes.
    """
    for folder in (file.parent, file.parent.parent):
        refuse_other_kinds(folder)


def listed_modules(directory: Path) -> tuple[Entry, ...]:
    """Read modules.json: the modules in order, or none where there is no such file.

    Raises:
        ConfigError: it is no list of objects with type and path, two have one name, or a path leaves the directory.
    """
    path = directory / MODULES
    if not path.is_file():
        return ()
    given = _read(path)
    found = []
    for position, entry in enumerate(given if isinstance(given, list) else [None]):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("type", "path")):
            raise ConfigError(
                f"{path}: entry {position} is {json.dumps(entry)[:100]}; a list of objects with name, path and type is "
                "needed. Restore it from the model's origin."
            )
        if not (directory / entry["path"]).resolve().is_relative_to(directory.resolve()):
            raise ConfigError(f"{path}: entry {position} has the path {entry['path']}, outside of the directory.")
        found.append(Entry(str(entry.get("name", position)), entry["path"], entry["type"]))
    twice = next((item.name for item in found if [other.name for other in found].count(item.name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{path}: two modules have the name {twice}, of which sentence-transformers would load the last alone. "
            "Give each its own name."
        )
    return tuple(found)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, or give an empty one where there is no file.

    Raises:
        ConfigError: the file holds no JSON object.
    """
    found = _read(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no JSON object; restore it from the model's origin")
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); restore it from the model's origin") from error
