"""Name what computes a stage beside its inputs: edgeq's code, Python, the packages, the CPU and its threads."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from edgeq.records import Record, Sha256
from edgeq.system import host

_OWN = "edgeq"
_EXTRAS = ("images",)  # whose packages the stages import in this process
# Variables by which libraries that compute choose their kernels, their threads or their precision.
_VARIABLES = re.compile(
    r"(ATEN|BLIS|DNNL|GOTO|KMP|MKL|NPY|NUMEXPR|OMP|ONEDNN|OPENBLAS|ORT|PYTORCH|TORCH|TRANSFORMERS|VECLIB)_\w+"
)


class MadeBy(Record):
    """Hold what a result depends on beside its inputs; FP32 sums differ in their last bits from CPU to CPU."""

    code: Sha256  # of edgeq
    python: str
    packages: tuple[str, ...]  # "name==version"
    machine: str
    cpu_flags: tuple[str, ...]
    threads: int  # CPUs that this process may use
    variables: tuple[str, ...]  # "NAME=value" of the environment


def own_code() -> MadeBy:
    """Name what a stage that runs edgeq's code alone depends on: of all packages, those that edgeq requires."""
    return _made_by(only_required=True)


def foreign_code() -> MadeBy:
    """Name what a stage that runs a model's own code depends on: every installed package, as it may import any."""
    return _made_by(only_required=False)


def _made_by(only_required: bool) -> MadeBy:
    return MadeBy(
        code=_own_code(),
        python=platform.python_version(),
        packages=_packages(only_required),
        machine=host.machine(),
        cpu_flags=tuple(sorted(host.cpu_flags())),
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        variables=variables(os.environ),
    )


def variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Spell those variables of an environment that decide how libraries compute, sorted."""
    return tuple(sorted(f"{name}={value}" for name, value in environment.items() if _VARIABLES.fullmatch(name)))


@functools.cache
def _own_code() -> str:
    """Hash all code of the package: two states of a checkout may have one version, and must not share entries."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _packages(only_required: bool) -> tuple[str, ...]:
    """Spell the installed packages with their versions: those that edgeq requires, directly or not, or all."""
    found = {_plain(item.name): item for item in metadata.distributions() if item.name}
    names: Iterable[str] = found
    if only_required and _OWN in found:  # else edgeq is a checkout on the path, and nothing says what it requires
        names = required({name: tuple(item.requires or ()) for name, item in found.items()})
    return tuple(sorted(f"{name}=={found[name].version}" for name in names))


def required(requirements: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Follow the requirements of edgeq and of what it requires.

    Args:
        requirements: of each installed package by name, as its metadata spells them.

    Returns:
        The names of installed packages, without edgeq's own.
    """
    reached, waiting = {_OWN}, [_OWN]
    while waiting:
        name = waiting.pop()
        for line in requirements[name]:
            spelled = re.match(r"[\w.-]+", line)
            extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", line)
            is_wanted = extra is None or (name == _OWN and extra[1] in _EXTRAS)
            if spelled is None or not is_wanted or _plain(spelled[0]) not in requirements:
                continue
            if _plain(spelled[0]) not in reached:
                reached.add(_plain(spelled[0]))
                waiting.append(_plain(spelled[0]))
    return reached - {_OWN}


def _plain(name: str) -> str:
    """Spell a package's name as all spellings of it compare: a-b for A_b."""
    return re.sub(r"[-_.]+", "-", name).lower()
