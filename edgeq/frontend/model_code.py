"""Find the Python code that a model's files name (`auto_map`, module classes of modules.json), and ask before it runs.

Nothing is imported or run here. Code that the user trusts runs in the child process that holds torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.errors import ConfigError, ToolMissing, Unsupported
from edgeq.frontend.model_kind import CONFIG, MODULES, OWN_MODULES, listed_modules, read_object
from edgeq.system.stage import InputFile, input_file

EXPORT_EXTRA = "pip install 'edgeq[export]'"
_FOREIGN = ("onnx", "openvino")
ELSEWHERE = "--"  # between repository and class in a reference to another repository's code
_CONFIGURATIONS = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# The classes of an auto_map that loading an embedding model asks for; those of task heads are not.
_ASKED = frozenset({"AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor"})


@dataclass(frozen=True)
class Reference:
    """Hold one class of code that a file of the model names.

    Attributes:
        file: that names it, relative to the model's directory.
        module: the Python file without its suffix.
        name: of the class.
        repository: of the hub, where the code lies in another one; None for the model's own directory.
    """

    file: str
    module: str
    name: str
    repository: str | None

    def __str__(self) -> str:
        """Name the class, its file, and who asks for it."""
        where = f" of the hub repository {self.repository}" if self.repository else ""
        return f"{self.name} in {self.module}.py{where} (named in {self.file})"


def references(directory: Path) -> tuple[Reference, ...]:
    """List the code that the files of a directory name, each class once.

    Raises:
        ConfigError: a file is not JSON, or names a class in a form that nothing loads.
        Unsupported: modules.json names a class of an installed package.
    """
    found = [*_of_auto_maps(directory), *_of_modules(directory)]
    return tuple({(item.repository, item.module, item.name): item for item in reversed(found)}.values())[::-1]


def trusted_code(directory: Path, is_trusted: bool | None) -> tuple[InputFile, ...]:
    """List the files of code that may run; none where the model has none or it may not run.

    Args:
        directory: of the model.
        is_trusted: True lets the model's own code run; False takes transformers' classes in its place; None refuses a
            model that has some.

    Returns:
        Each with its path relative to the directory, or to another repository: "OWNER/NAME--FILE.py".

    Raises:
        Unsupported: the model has code and `is_trusted` is None, or no class of transformers can take its place.
        ConfigError: the code is not there.
        ToolMissing: it lies in another repository, and huggingface_hub is not installed.
    """
    named = references(directory)
    if not named:
        return ()
    if is_trusted is None or (is_trusted is False and any(item.file == MODULES for item in named)):
        raise Unsupported(_question(directory, named))
    if is_trusted is False:
        return ()
    found: dict[str, Path] = {}
    for repository in dict.fromkeys(item.repository for item in named):
        folder = directory if repository is None else _snapshot(directory, repository, named)
        for item in named:
            if item.repository == repository and not _files(folder, f"{item.module}.py"):
                raise ConfigError(f"{directory}: {item.file} names {item}, and {folder} has no such file. Restore it.")
        start = "" if repository is None else f"{repository}{ELSEWHERE}"
        for path in _files(folder, "*.py"):
            found[f"{start}{path.relative_to(folder).as_posix()}"] = path
    return tuple(input_file(path, name) for name, path in found.items())


def _files(folder: Path, pattern: str) -> list[Path]:
    """List files by name, but none in a hidden folder or in those of other frameworks, which nothing is loaded from."""
    found = ((path.relative_to(folder).parts, path) for path in folder.rglob(pattern))
    return sorted(
        path for parts, path in found if parts[0] not in _FOREIGN and not any(part.startswith(".") for part in parts)
    )


def _question(directory: Path, named: tuple[Reference, ...]) -> str:
    """Say what would run, and give the ways to let it run or to do without."""
    has_module = any(item.file == MODULES for item in named)
    without = "" if has_module else (
        " Where transformers has an architecture and a tokenizer of its own for the model, --no-trust-remote-code "
        "takes those, whose vectors need not be the same."
    )  # fmt: skip
    return (
        f"{directory}: the model has code of its own: {'; '.join(map(str, named))}. edgeq runs no model's code "
        "unasked. Read that code; then give --trust-remote-code (in Python trust_remote_code=True), and it runs in the "
        "child process that holds torch, and the manifest says so. Or load the model yourself and give the module: "
        "edgeq.export(AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True), targets=[...], "
        f"tokenizer=DIRECTORY, out=OUT).{without}"
    )


def _of_auto_maps(directory: Path) -> Iterator[Reference]:
    """Read each auto_map: class of transformers -> reference, or a list of references, of which some are null."""
    for path in sorted(path for name in _CONFIGURATIONS for path in _files(directory, name)):
        given = read_object(path).get("auto_map") or {}
        file = path.relative_to(directory).as_posix()
        named = given if isinstance(given, dict) else {"AutoTokenizer": given}  # a list: tokenizers of old
        for key, value in named.items():
            for reference in value if isinstance(value, list) else [value]:
                if key in _ASKED and reference is not None:
                    yield _reference(path, file, reference)


def _of_modules(directory: Path) -> Iterator[Reference]:
    """Read the types of modules.json that are no classes of sentence-transformers: FILE.CLASS of the directory."""
    for entry in listed_modules(directory):
        if entry.type.startswith(OWN_MODULES):
            continue
        package = entry.type.rpartition(ELSEWHERE)[2]
        if package.count(".") != 1:
            raise Unsupported(
                f"{directory / MODULES}: module {entry.name} is {entry.type}, a class of an installed package; classes "
                "of sentence-transformers, or of a .py file of the model (FILE.CLASS), can be loaded. Write what the "
                "module does with those of sentence-transformers, or export it as a module: edgeq.export(MODULE, ...)."
            )
        yield _reference(directory / MODULES, MODULES, entry.type)


def _reference(path: Path, file: str, given: Any) -> Reference:
    repository, _, rest = str(given).rpartition(ELSEWHERE)
    module, _, name = rest.partition(".")
    if not isinstance(given, str) or not module or not name or "." in name or not module.isidentifier():
        raise ConfigError(f"{path}: names the class {given!r}; FILE.CLASS, or REPOSITORY--FILE.CLASS, is needed")
    return Reference(file, module, name, repository or None)


def _snapshot(directory: Path, repository: str, named: tuple[Reference, ...]) -> Path:
    """Find a hub repository in the local cache; nothing is downloaded."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ToolMissing(f"a model's code needs huggingface_hub ({error}); install: {EXPORT_EXTRA}") from error
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        files = ", ".join(dict.fromkeys(f"{item.module}.py" for item in named if item.repository == repository))
        raise ConfigError(
            f"{directory}: its code ({files}) lies in the hub repository {repository}, which is not in the local "
            f"cache, and edgeq downloads nothing. Fetch it once (`hf download {repository}`); or put the .py files "
            f'into the directory, and take "{repository}{ELSEWHERE}" out of auto_map.'
        ) from error
