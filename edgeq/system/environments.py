"""Make private virtual environments, for toolchains whose pins conflict with edgeq's own or with each other's.

Each is made once, in the cache, from exact pins. Its packages are never imported here: `edgeq.system.worker` talks to
a child process that runs in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from filelock import FileLock

from edgeq.errors import ToolMissing
from edgeq.system.cache import Cache
from edgeq.system.files import replacing_dir, storage_errors
from edgeq.system.host import machine

KIND = "environments"  # under which `edgeq cache` lists and purges them

_PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
_PROBE_LIMIT_S = 60.0
_PIP = ("-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """Describe an environment by its name and the packages in it.

    Attributes:
        name: what `edgeq doctor --install` calls it.
        requirements: exact pins, e.g. "numpy==1.26.4".
        python_versions: of Python that the packages support, e.g. "3.11".
        forced: pins installed with `pip --no-deps`, because their own requirements cannot be met; `requirements`
            must hold what they need.
    """

    name: str
    requirements: tuple[str, ...]
    python_versions: tuple[str, ...]
    forced: tuple[str, ...] = ()

    @property
    def pins(self) -> dict[str, str]:
        """Map the name of each pinned package to its version."""
        return dict(pin.split("==") for pin in (*self.forced, *self.requirements))


def interpreter(environment: Environment) -> Path:
    """Give the Python interpreter of an environment; make the environment first if it is not there.

    Two processes that want the same one at once wait for each other. An environment is made under a temporary name and
    renamed at the end, so a killed pip leaves none that looks complete. Run its tools as `python -m TOOL`: the scripts
    in its `bin` still have the temporary path.

    Raises:
        ToolMissing: no Python fits, or pip cannot install the pins; the message holds the command to run by hand.
        StorageFailed: the cache cannot be written.
    """
    python = find_interpreter(environment)
    if python is not None:
        return python
    base, version = _base(environment, _versions(environment))
    folder = _folder(environment, version)
    with storage_errors(f"the cache {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))  # the one that purging takes
        lock.acquire()
    try:
        if not _is_usable(folder):
            _remove_leftovers(folder)
            _log.warning("making the environment %s (Python %s); this is done once", environment.name, version)
            _make(environment, base, folder)
    finally:
        lock.release()
    return _python(folder)


def find_interpreter(environment: Environment) -> Path | None:
    """Give the Python interpreter of an environment that was made before, or None."""
    folders = (_folder(environment, version) for version in _versions(environment))
    return next((_python(folder) for folder in folders if _is_usable(folder)), None)


def require_interpreter(environment: Environment) -> Path:
    """Give the Python interpreter of an environment that only `edgeq doctor --install` makes, because it is large.

    Raises:
        ToolMissing: it has not been made.
    """
    python = find_interpreter(environment)
    if python is None:
        raise ToolMissing(
            f"the environment {environment.name} ({', '.join(environment.forced or environment.requirements)}) is not "
            f"there; make it with: edgeq doctor --install {environment.name}"
        )
    return python


def _versions(environment: Environment) -> list[str]:
    """List the Python versions that the environment supports, the running one first."""
    running = "{}.{}".format(*sys.version_info[:2])
    return sorted(environment.python_versions, key=lambda version: version != running)


def _folder(environment: Environment, version: str) -> Path:
    """Give the folder of an environment; its name holds a hash of all that decides the content.

    A machine other than x86_64 has a part in it; a cache may be shared by machines of two instruction sets.
    """
    held = {field.name: getattr(environment, field.name) for field in fields(environment)}
    content = {name: value for name, value in held.items() if name not in ("name", "python_versions") and value}
    content["python"] = version
    if machine() != "x86_64":
        content["machine"] = machine()
    text = json.dumps(content, sort_keys=True)
    return Cache().root / KIND / f"{environment.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _is_usable(folder: Path) -> bool:
    """Tell whether an environment exists, and the Python that it was made from, to which its own is a link."""
    return _python(folder).exists()


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished folders of killed runs; only the holder of the environment's lock may."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _base(environment: Environment, versions: Sequence[str]) -> tuple[Path, str]:
    """Find a Python to make an environment from, and give its path and version.

    Raises:
        ToolMissing: none fits.
    """
    refused: list[str] = []
    for version in versions:
        for candidate in _candidates(version):
            if _answers(candidate, version):
                return candidate, version
            refused.append(str(candidate))
    found = f"{', '.join(refused)} cannot make environments, and no other is" if refused else "none is"
    raise ToolMissing(
        f"environment {environment.name}: {' '.join(environment.requirements)} needs Python {' or '.join(versions)} "
        f"with the modules venv and ensurepip; {found} on PATH or below ~/.pyenv/versions, and edgeq runs on "
        f"{sys.version_info[0]}.{sys.version_info[1]}. Install one, e.g. with `pyenv install {versions[0]}`, "
        "and run edgeq again."
    )


def _candidates(version: str) -> Iterator[Path]:
    """List interpreters that may have a version, in the order of trying: our own, those on PATH, those of pyenv."""
    if version == "{}.{}".format(*sys.version_info[:2]):
        yield Path(sys.executable)
    for folder in os.get_exec_path():
        path = Path(folder) / f"python{version}"
        if path.is_file() and os.access(path, os.X_OK):
            yield path
    releases: dict[int, Path] = {}
    for folder_path in (Path.home() / ".pyenv" / "versions").glob(f"{version}.*"):
        match = re.fullmatch(re.escape(version) + r"\.(\d+)", folder_path.name)
        if match and (folder_path / "bin" / "python3").is_file():
            releases[int(match[1])] = folder_path / "bin" / "python3"
    yield from (releases[release] for release in sorted(releases, reverse=True))


def _answers(python: Path, version: str) -> bool:
    """Tell whether an interpreter has a version and can make environments, which shims and split packages cannot."""
    try:
        answer = subprocess.run(
            [python, "-I", "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PROBE_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and answer.stdout.strip() == version


def _make(environment: Environment, base: Path, folder: Path) -> None:
    """Make an environment from a Python.

    It is made under a temporary name and renamed. Were it made under its own name, a pip that outlives a killed edgeq
    would go on writing into the environment that the next run makes.

    Raises:
        ToolMissing: venv or pip fails.
        StorageFailed: the cache cannot be written.
    """
    with replacing_dir(folder) as partial:
        make: list[str | Path] = [base, "-I", "-m", "venv", partial]
        pip: list[str | Path] = [_python(partial), "-I", *_PIP]
        installs = [[*pip, *environment.requirements]]
        if environment.forced:
            installs.append([*pip, "--no-deps", *environment.forced])
        for command in (make, *installs):
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
            if done.returncode:
                raise ToolMissing(_explain(environment, base, done.stdout))


def _explain(environment: Environment, base: Path, log: str) -> str:
    """Explain a failure: the last line of venv or pip, and the command that shows the rest."""
    last = (log.strip().splitlines() or ["it said nothing"])[-1]
    by_hand = shlex.join([str(base), "-m", "venv", environment.name])
    pip = (f"{environment.name}/bin/python", "-m", "pip", "install")
    install = shlex.join([*pip, *environment.requirements])
    if environment.forced:
        install += " && " + shlex.join([*pip, "--no-deps", *environment.forced])
    wanted = " ".join((*environment.requirements, *environment.forced))
    return (
        f"environment {environment.name}: {wanted} cannot be installed by {base}: {last}\n"
        f"To see all of it, run by hand: {by_hand} && {install}\nWhen that works, run edgeq again."
    )
