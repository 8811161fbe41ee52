"""Make private virtual environments, for toolchains whose pins conflict with edgeq's own or with each other's.

Each is made once, under the cache, from exact pins. Nothing of it is imported here: `edgeq.system.worker` talks to it.
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
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from edgeq.errors import ToolMissing
from edgeq.system.cache import Cache
from edgeq.system.files import replacing_dir, storage_errors

KIND = "environments"  # the kind `edgeq cache` lists and purges them under

_PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
_PROBE_LIMIT_S = 60.0
_PIP = ("-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """Name an environment and say what is in it.

    Attributes:
        name: what `edgeq doctor --install` calls it.
        requirements: exact pins, e.g. "numpy==1.26.4".
        python_versions: those that can serve it, e.g. "3.11".
        forced: pins that are installed without what they ask for, because nothing meets it; `requirements` stand in.
    """

    name: str
    requirements: tuple[str, ...]
    python_versions: tuple[str, ...]
    forced: tuple[str, ...] = ()

    @property
    def pins(self) -> dict[str, str]:
        """Give the version of each package that is pinned, by name."""
        return dict(pin.split("==") for pin in (*self.forced, *self.requirements))


def interpreter(environment: Environment) -> Path:
    """Give the Python interpreter of an environment; make the environment first if it is not there.

    Two processes that want the same one at once wait for each other. A killed pip leaves nothing that is taken for
    complete. Run its tools as `python -m`: an environment is renamed once it is whole, which the scripts in its `bin`
    do not follow.

    Raises:
        ToolMissing: no Python fits, or pip cannot install the pins; the message holds the command to run by hand.
        StorageFailed: the cache cannot be written.
    """
    there = made(environment)
    if there is not None:
        return there
    base, version = _base(environment, _versions(environment))
    place = _place(environment, version)
    with storage_errors(f"the cache {place.parent}"):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_suffix(".lock"))  # the one that purging takes
        lock.acquire()
    try:
        if not _is_usable(place):
            _remove_leftovers(place)
            _log.warning("making the environment %s (Python %s); this is done once", environment.name, version)
            _make(environment, base, place)
    finally:
        lock.release()
    return _python(place)


def made(environment: Environment) -> Path | None:
    """Give the Python interpreter of an environment that is there, or None."""
    places = (_place(environment, version) for version in _versions(environment))
    return next((_python(place) for place in places if _is_usable(place)), None)


def require_interpreter(environment: Environment) -> Path:
    """Give the Python interpreter of an environment that is too large to be made without being asked for.

    Raises:
        ToolMissing: it is not there.
    """
    there = made(environment)
    if there is None:
        raise ToolMissing(
            f"the environment {environment.name} ({', '.join(environment.forced or environment.requirements)}) is not "
            f"there; make it with: edgeq doctor --install {environment.name}"
        )
    return there


def _versions(environment: Environment) -> list[str]:
    """Give the Python versions that can serve, the running one first."""
    running = "{}.{}".format(*sys.version_info[:2])
    return sorted(environment.python_versions, key=lambda version: version != running)


def _place(environment: Environment, version: str) -> Path:
    """Give the folder of an environment: whatever decides its content stands in its name."""
    content: dict[str, object] = {"requirements": environment.requirements, "python": version}
    if environment.forced:
        content["forced"] = environment.forced
    text = json.dumps(content, sort_keys=True)
    return Cache().root / KIND / f"{environment.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _python(place: Path) -> Path:
    return place / "bin" / "python"


def _is_usable(place: Path) -> bool:
    """Say whether an environment is there, and the Python it was made from too: its own is a link to that one."""
    return _python(place).exists()


def _remove_leftovers(place: Path) -> None:
    """Remove what killed runs left of this environment; only the holder of its lock may."""
    for leftover in place.parent.glob(f".{place.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _base(environment: Environment, versions: Sequence[str]) -> tuple[Path, str]:
    """Find the Python to make an environment from, and its version.

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
    """Give the interpreters that may be of a version, in the order they are tried; every entry of PATH counts."""
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
    """Say whether an interpreter is of a version and can make environments: shims and split packages may not."""
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


def _make(environment: Environment, base: Path, place: Path) -> None:
    """Make an environment from a Python.

    Under a name of its own and renamed, not in place with a mark at the end: a pip that outlives a killed edgeq would
    go on writing into what the next run makes there.

    Raises:
        ToolMissing: venv or pip fails.
        StorageFailed: the cache cannot be written.
    """
    with replacing_dir(place) as partial:
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
                raise ToolMissing(_why_not(environment, base, done.stdout))


def _why_not(environment: Environment, base: Path, log: str) -> str:
    """Repeat the last line of venv or pip, and give the command that shows the rest."""
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
