"""Read target files, targets/*.toml, and find the data folders of a checkout or a wheel."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

from pydantic import ValidationError

from edgeq.errors import ConfigError
from edgeq.records import Target
from edgeq.system import host
from edgeq.system.untrusted import oversize

_MOST_BYTES = 1 << 20
_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Give the path of a data folder: the checkout's own, or the one inside the wheel.

    Raises:
        ConfigError: neither is there.
    """
    checkout, wheel = _PACKAGE.parent / name, _PACKAGE / "_data" / name
    for folder, is_ours in ((checkout, (_PACKAGE.parent / "pyproject.toml").is_file()), (wheel, True)):
        if is_ours and folder.is_dir():
            return folder
    raise ConfigError(f"{wheel}: not there; the installation is damaged: install edgeq again")


def list_targets(targets_dir: Path | None = None) -> tuple[Target, ...]:
    """Read every target, sorted by name.

    Args:
        targets_dir: the folder of the target files; None means the checkout's or the wheel's.

    Raises:
        ConfigError: a file is no valid target, or the folder holds none.
    """
    folder = targets_dir or data_dir("targets")
    files = sorted(folder.glob("*.toml"), key=lambda path: path.stem) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"{folder}: no target files (*.toml) are there; give --targets a folder that holds some")
    return tuple(_read(path) for path in files)


def load_target(name: str, targets_dir: Path | None = None) -> Target:
    """Read one target by its name.

    Raises:
        ConfigError: no target of that name, with the nearest names; or its file is not valid.
    """
    folder = targets_dir or data_dir("targets")
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in names:
        near = " or ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4))
        guess = f"; did you mean {near}?" if near else "."
        raise ConfigError(f'target "{name}" is not there{guess} `edgeq targets` lists all.')
    return _read(folder / f"{name}.toml")


def availability(target: Target) -> tuple[bool, str]:
    """Say whether this machine meets the target's `runs_on`, and what it lacks."""
    missing = host.meets(target.runs_on)
    return not missing, "; ".join(missing)


def _read(path: Path) -> Target:
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise ConfigError(f"{path}: {reason}; a target file is needed")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib's own error and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        target = Target.model_validate(content, strict=False)
    except ValidationError as error:
        problems = "\n".join(f"  - {_problem(item)}" for item in error.errors())
        raise ConfigError(f"{path}: no valid target:\n{problems}") from error
    if target.name != path.stem:
        raise ConfigError(f'{path}: name is "{target.name}"; it must be the file\'s own name, "{path.stem}"')
    return target


def _problem(item: object) -> str:
    fields = item if isinstance(item, dict) else {}
    where = ".".join(str(part) for part in fields.get("loc", ()))
    if fields.get("type") == "extra_forbidden":
        allowed = [name for name in Target.model_fields if name not in where]
        near = difflib.get_close_matches(where.split(".")[-1], [*allowed, *_gate_names()], n=1)
        return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if fields.get("type") == "missing":
        return f"{where}: missing"
    return f"{where}: {fields.get('msg')}, found {fields.get('input')!r}"


def _gate_names() -> list[str]:
    from edgeq.records import Gate, RunsOn

    return [*Gate.model_fields, *RunsOn.model_fields]
