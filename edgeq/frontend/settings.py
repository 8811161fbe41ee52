"""Read the settings of sentence-transformers' and transformers' files: each is honoured, unused or refused, by name.

A setting that is in none of `TABLES` is unknown: of the encoder's file it is refused, as sentence-transformers does; of
the others it is listed in the source's record, with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.known_settings import ENCODER as ENCODER
from edgeq.frontend.known_settings import IMAGES, MODEL, MODULES, PROCESSING, TABLES, TOKENIZER_CONFIG

UNKNOWN = " (unknown)"  # ends the name of an unknown setting among the unused
# The names under which old releases saved the encoder's file, in the order in which sentence-transformers looks.
ENCODER_FILES = (ENCODER, *(f"sentence_{kind}_config.json" for kind in (
    "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet",
)))  # fmt: skip
_TEXT = ("text", "common")
# What edgeq does not apply to an ONNX file that it reads itself, and the values that ask for nothing.
_NOT_FOR_ONNX: Mapping[tuple[str, str], tuple[object, ...]] = {
    (ENCODER, "do_lower_case"): (None, False),
    (ENCODER, "tokenizer_args"): (None,),
    (ENCODER, "processor_kwargs"): (None,),
    (MODEL, "truncate_dim"): (None,),
    ("Dense/config.json", "use_residual"): (None, False),
    ("Dense/config.json", "module_input_name"): (None, "sentence_embedding"),
    ("Dense/config.json", "module_output_name"): (None, "sentence_embedding"),
    ("Normalize/config.json", "module_input_name"): (None, "sentence_embedding"),
    ("Normalize/config.json", "module_output_name"): (None, "sentence_embedding"),
}
# In these files unused settings lie so often that their names would tell nothing.
_QUIET = {TOKENIZER_CONFIG, IMAGES, "special_tokens_map.json", "Dropout/config.json"}


@dataclass(frozen=True)
class Settings:
    """Hold the settings that edgeq applies itself, and those that nothing reads.

    Attributes:
        max_length: where all methods cut texts instead of `max_seq_length`; None where that counts.
        query_length: where `encode_query` cuts texts; None where it does as `encode`.
        document_length: where `encode_document` does.
        unused: "FILE: KEY" of each, with UNKNOWN behind those that edgeq does not know.
    """

    max_length: int | None = None
    query_length: int | None = None
    document_length: int | None = None
    unused: tuple[str, ...] = ()

    def require_within(self, limit: int, name: str) -> None:
        """Refuse a length of queries or documents above the one that the graph takes.

        Raises:
            Unsupported: it is above.
        """
        for key, length in (("query_length", self.query_length), ("document_length", self.document_length)):
            if length is not None and length > limit:
                raise Unsupported(
                    f"{name}: {ENCODER} has {key} {length}, and the model takes at most {limit} tokens; a bundle has "
                    f"one longest text. Set max_seq_length to {length} if the model has so many positions, or lower "
                    f"{key}."
                )


def read(directory: Path, takes_images: bool = False, is_onnx: bool = False) -> Settings:
    """Read the settings of a model's directory.

    Args:
        directory: of the model, or of an ONNX file's configuration.
        takes_images: whether its images are embedded; its texts are otherwise.
        is_onnx: whether neither sentence-transformers nor transformers loads it, but edgeq alone.

    Raises:
        ConfigError: a file holds no JSON of the form that it should have.
        Unsupported: a setting cannot be honoured.
    """
    unused: list[str] = []
    found = Settings()
    needless = _NOT_FOR_ONNX if is_onnx else {}
    for file, table, content in _files(directory, takes_images):
        where = file.relative_to(directory).as_posix()
        for key, value in content.items():
            if (table, key) in needless and value != {} and value not in needless[table, key]:
                raise Unsupported(
                    f"{where}: {key} is {value!r}, which sentence-transformers applies when it loads a model, and an "
                    "ONNX file is not loaded by it. Export the model's directory, or put it into the file or the "
                    "tokenizer and take it out here."
                )
        if table == ENCODER:
            found = _encoder(where, content, takes_images, unused)
        else:
            _check(where, table, content, unused)
    return Settings(found.max_length, found.query_length, found.document_length, tuple(sorted(set(unused))))


def _files(directory: Path, takes_images: bool) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Give each file with settings, the name of its table, and what it holds."""
    if (directory / MODULES).is_file():
        yield from _module_files(directory)
        if (directory / MODEL).is_file():
            yield directory / MODEL, MODEL, _object(directory / MODEL)
    for name in (IMAGES,) if takes_images else (TOKENIZER_CONFIG, "special_tokens_map.json"):
        for folder in (directory, directory / "0_Transformer"):
            if (folder / name).is_file():
                yield folder / name, name, _object(folder / name)
                break


def _module_files(directory: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Give the entries of modules.json, and the files of the modules that they name."""
    entries = _json(directory / MODULES)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{directory / MODULES}: no list of modules; restore it from the model's origin")
    for position, entry in enumerate(entries):
        yield directory / MODULES, MODULES, entry
        folder = directory / str(entry.get("path", ""))
        kind = str(entry.get("type", "")).rpartition(".")[2]
        if position == 0 and kind != "StaticEmbedding":
            file = next((folder / name for name in ENCODER_FILES if (folder / name).is_file()), None)
            if file is not None:
                yield file, ENCODER, _object(file)
        elif f"{kind}/config.json" in TABLES and entry.get("path") and (folder / "config.json").is_file():
            yield folder / "config.json", f"{kind}/config.json", _object(folder / "config.json")


def _encoder(where: str, content: dict[str, Any], takes_images: bool, unused: list[str]) -> Settings:
    """Read the encoder's file.

    Raises:
        ConfigError: a length is no positive number.
        Unsupported: a setting is unknown, or cannot be honoured.
    """
    for key in content:
        if key not in TABLES[ENCODER]:
            raise Unsupported(
                f"{where}: {key} is no setting that edgeq or its release of sentence-transformers knows, and it may "
                "change the vectors. Take it out, or install the release that wrote it."
            )
    _check(where, ENCODER, content, unused)
    length = _processing(where, content.get("processing_kwargs") or {}, takes_images, unused)
    own = {key: _length(where, key, content.get(key)) for key in ("query_length", "document_length")}
    if length is not None:
        unused += [f"{where}: {key} (processing_kwargs has max_length)" for key, value in own.items() if value]
        return Settings(length)
    return Settings(None, own["query_length"], own["document_length"])


def _processing(where: str, given: object, takes_images: bool, unused: list[str]) -> int | None:
    """Read the arguments with which sentence-transformers calls the tokenizer; give the length at which they cut.

    Raises:
        ConfigError: they are no objects.
        Unsupported: one of them cannot be honoured.
    """
    if not isinstance(given, dict) or not all(isinstance(part, dict) for part in given.values()):
        raise ConfigError(f"{where}: processing_kwargs is {given!r}; an object of objects is needed")
    if takes_images:
        told = [
            f"{part}.{key}" for part in ("image", "common") for key in given.get(part, {}) if key != "return_tensors"
        ]
        if told:
            raise Unsupported(
                f"{where}: processing_kwargs has {told[0]}, which changes how images are prepared; write it into "
                "preprocessor_config.json instead."
            )
        return None
    unused += [f"{where}: processing_kwargs.{part}" for part in given if part not in _TEXT]
    merged: dict[str, Any] = {}
    for part in _TEXT:  # the later one wins, as in sentence-transformers
        content = given.get(part, {})
        for key in content:
            if key not in TABLES[PROCESSING]:
                raise Unsupported(
                    f"{where}: processing_kwargs.{part}.{key} is {content[key]!r}, which may change the token ids, and "
                    "a tokenizer.json does not hold it. Save the tokenizer so that it does the same, and take it out."
                )
        _check(where, PROCESSING, content, unused, f"processing_kwargs.{part}.")
        merged |= content
    return _length(where, "processing_kwargs: max_length", merged.get("max_length"))


def _check(where: str, table: str, content: dict[str, Any], unused: list[str], prefix: str = "") -> None:
    """Refuse settings, and note unused and unknown ones.

    Raises:
        Unsupported: one is refused.
    """
    for key, value in content.items():
        setting = TABLES[table].get(key)
        if setting is None:
            unused.append(f"{where}: {prefix}{key}{UNKNOWN}")
            continue
        is_silent = any(value is item or (isinstance(item, str) and value == item) for item in setting.says_nothing)
        if setting.verdict == "honoured" or is_silent:
            continue
        if setting.verdict == "refused":
            raise Unsupported(f"{where}: {prefix}{key} is {value!r}: it {setting.why}.")
        if table not in _QUIET and value not in ([], {}) and key != "__version__":
            unused.append(f"{where}: {prefix}{key}")


def _length(where: str, key: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {key} is {value!r}; a positive number of tokens is needed")
    return value


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no JSON object; restore it from the model's origin")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); restore it from the model's origin") from error
