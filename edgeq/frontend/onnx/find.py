"""Find an ONNX file, its tokenizer, and the configuration beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeq.errors import ConfigError
from edgeq.frontend import settings
from edgeq.frontend.onnx.read import external_files
from edgeq.frontend.weight_files import has_weights
from edgeq.system.stage import InputFile, input_file

MODULES, TOKENIZER, CONFIG = "modules.json", "tokenizer.json", "config.json"
PROMPTS, _TOKENIZER_CONFIG = "config_sentence_transformers.json", "tokenizer_config.json"
# What a bundle carries of an ONNX file's configuration, and what is read of it: exporting sees no other file.
CARRIED = (
    CONFIG, "added_tokens.json", "chat_template.jinja", PROMPTS, "merges.txt", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.model", _TOKENIZER_CONFIG, "vocab.json", "vocab.txt",
)  # fmt: skip
CONFIGURATION = (*CARRIED, MODULES, *settings.ENCODER_FILES)
SUFFIX = ".onnx"

_log = logging.getLogger(__name__)

_FOLDER, _USUAL = "onnx", "model.onnx"
_LARGEST_LIMIT = 1_000_000  # tokens


@dataclass(frozen=True)
class OnnxOptions:
    """Hold the options of an ONNX file.

    Attributes:
        tokenizer: a tokenizer.json, or the folder that holds it and the model's configuration.
        max_sequence: the longest sequence in tokens; None takes the configuration's.
        normalize: whether vectors get length 1; None follows modules.json, or keeps them where there is none.
        kind: "onnx" for a user's file, "module" for one that edgeq traced from a torch module.
    """

    tokenizer: Path | None = None
    max_sequence: int | None = None
    normalize: bool | None = None
    kind: Literal["onnx", "module"] = "onnx"


@dataclass(frozen=True)
class OnnxFile:
    """Hold an ONNX file, its tokenizer, configuration and hash.

    Attributes:
        path: the file.
        tokenizer: its tokenizer.json.
        config_dir: the folder with the configuration, or None where only a tokenizer.json is known.
        max_sequence: in tokens, special tokens included.
        normalize: as OnnxOptions has it.
        kind: as OnnxOptions has it.
        sha256: of all files and options that decide the vectors.
        weights: the file itself and the files beside it that hold its weights.
        files: the tokenizer and, of the configuration, what is read: below `tokenizer.parent`, by name.
    """

    path: Path
    tokenizer: Path
    config_dir: Path | None
    max_sequence: int
    normalize: bool | None
    kind: Literal["onnx", "module"]
    sha256: str
    weights: tuple[InputFile, ...] = ()
    files: tuple[InputFile, ...] = ()

    @property
    def name(self) -> str:
        """Give the file's name, or its folder's where the file has the usual name model.onnx."""
        if self.kind == "module":
            return self.path.stem
        folder = self.path.parent.parent if self.path.parent.name == _FOLDER else self.path.parent
        return folder.name if self.path.name == _USUAL and folder.name else self.path.name


def find_onnx(model: str, pooling: str | None, options: OnnxOptions) -> OnnxFile | None:
    """Find the ONNX file that the user named, or the one in a directory without torch weights.

    Args:
        model: as the user named it.
        pooling: the mode for a file whose output is token vectors.
        options: of the file.

    Returns:
        The file, or None where the model is no ONNX file.

    Raises:
        ConfigError: the tokenizer or the longest sequence is not known, or the model is no ONNX file and has `options`.
    """
    path = _file(Path(model).expanduser())
    if path is None:
        given = [name for name, value in _spelled(options).items() if value is not None]
        if given:
            raise ConfigError(f"{model}: {', '.join(given)} belong to an ONNX file, and this is none. Leave them out.")
        return None
    tokenizer = tokenizer_file(options.tokenizer) if options.tokenizer is not None else _tokenizer_beside(path)
    config_dir = tokenizer.parent if any((tokenizer.parent / name).is_file() for name in (MODULES, CONFIG)) else None
    limit = options.max_sequence or stated_limit(tokenizer)
    if limit is None:
        raise ConfigError(
            f"{path}: neither {tokenizer.name} nor a configuration beside it says how long a text may be; "
            "give --max-sequence with the model's limit in tokens."
        )
    weights = tuple(input_file(path.parent / name, name) for name in (path.name, *_beside(path)))
    files = _files(tokenizer, has_config=config_dir is not None)
    identity = _identity(weights, files, (pooling, options.normalize, limit, options.kind, config_dir is not None))
    return OnnxFile(
        path, tokenizer, config_dir, limit, options.normalize, options.kind, identity, weights, files
    )  # fmt: skip


def _spelled(options: OnnxOptions) -> dict[str, object]:
    return {
        "--tokenizer": options.tokenizer,
        "--max-sequence": options.max_sequence,
        "--normalize": options.normalize,
    }


def _file(path: Path) -> Path | None:
    if path.is_file() and path.suffix == SUFFIX:
        return path.resolve()
    if not path.is_dir():
        return None
    if any(has_weights(folder) for folder in (path, path / "0_Transformer")):
        return None
    for folder in (path / _FOLDER, path):
        if (folder / _USUAL).is_file():
            return (folder / _USUAL).resolve()
        files = sorted(folder.glob(f"*{SUFFIX}"))
        if len(files) == 1:
            return files[0].resolve()
        if files:
            names = ", ".join(file.name for file in files)
            raise ConfigError(f"{folder}: holds {names}, and none is {_USUAL}; name the FP32 one among them.")
    return None


def tokenizer_file(given: Path) -> Path:
    """Give the tokenizer.json that the user named, or the one in the folder that the user named.

    Raises:
        ConfigError: there is none.
    """
    file = given if given.is_file() else given / TOKENIZER
    if not file.is_file():
        raise ConfigError(f"--tokenizer {given}: neither a tokenizer.json nor a folder that holds one")
    return file.resolve()


def _tokenizer_beside(path: Path) -> Path:
    folders = [path.parent, *([path.parent.parent] if path.parent.name == _FOLDER else [])]
    for folder in folders:
        if (folder / TOKENIZER).is_file():
            return folder / TOKENIZER
    raise ConfigError(
        f"{path}: no {TOKENIZER} lies beside it, and texts cannot become tokens without one; "
        "give --tokenizer with the file or its folder."
    )


def read_json(path: Path) -> Any:
    """Read a JSON file, or give an empty object where there is none.

    Raises:
        ConfigError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); restore it from the model's origin") from error


def stated_limit(tokenizer: Path) -> int | None:
    """Read the longest text in tokens from the files of sentence-transformers, the tokenizer, or the model's config.

    Where only the truncation of tokenizer.json states one, a warning says so: it is how texts were cut in some earlier
    use, and need not be what the model takes (all-MiniLM-L6-v2's says 128, and it takes 256).

    Returns:
        The first of these that is stated, or None.
    """
    folder = tokenizer.parent
    truncation = read_json(tokenizer).get("truncation") or {}
    cut = _limit(truncation.get("max_length"))
    stated = settings.read(folder, is_onnx=True).max_length
    stated = stated or _limit(read_json(folder / settings.ENCODER).get("max_seq_length"))
    stated = stated or _limit(read_json(folder / "tokenizer_config.json").get("model_max_length"))
    if stated is None and cut is not None:
        _log.warning(
            "%s: texts are cut at %d tokens, the truncation that stands there; no file says what the model takes; "
            "give --max-sequence (max_sequence=) if it takes more.",
            tokenizer,
            cut,
        )
    return stated or cut or _limit(read_json(folder / CONFIG).get("max_position_embeddings"))


def _limit(value: Any) -> int | None:
    """Give a limit in tokens, or None for what is none: tokenizers without one state 1e30."""
    is_limit = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST_LIMIT
    return int(value) if is_limit else None


def _beside(path: Path) -> list[str]:
    """Name the files that hold an ONNX file's weights; one that is missing is told of when the file is read."""
    return [name for name in external_files(path) if (path.parent / name).is_file()]


def _files(tokenizer: Path, has_config: bool) -> tuple[InputFile, ...]:
    """Name the tokenizer, what stands beside it about tokens, and the configuration where there is one."""
    folder = tokenizer.parent
    names = {tokenizer.name, _TOKENIZER_CONFIG, *(CONFIGURATION if has_config else ())}
    paths = [folder / name for name in sorted(names)]
    if has_config:  # of the modules: a Dense has weights
        paths += sorted(folder.glob("[0-9]*_*/*"))
    return tuple(input_file(path, path.relative_to(folder).as_posix()) for path in paths if path.is_file())


def _identity(weights: Sequence[InputFile], files: Sequence[InputFile], options: tuple[object, ...]) -> str:
    """Hash an ONNX file with its weights, the tokenizer, the configuration and the options; no path, no file's name.

    The graph names the files of its weights; of the configuration, which file holds what is told apart by name.
    """
    digest = hashlib.sha256(f"{options}\n".encode())
    for item in weights:
        digest.update(f"{item.file.sha256}\n".encode())
    for item in files:
        digest.update(f"{item.name} {item.file.sha256}\n".encode())
    return digest.hexdigest()
