"""List the backends by name, and import a backend's module when it is asked for; importing all is slow."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import cast

from edgeq.backends.contract import Backend
from edgeq.errors import ConfigError

# Name, as target files give it -> the module that satisfies `Backend`, or an object that does.
BACKENDS: dict[str, str | Backend] = {
    "ethos_u": "edgeq.backends.ethos_u",
    "onnxruntime": "edgeq.backends.onnxruntime",
    "openvino": "edgeq.backends.openvino",
    "qnn": "edgeq.backends.qnn",
    "rockchip": "edgeq.backends.rockchip",
    "tflite": "edgeq.backends.tflite",
}


def find(name: str, where: str) -> Backend:
    """Give a backend by name.

    Args:
        name: a key of `BACKENDS`.
        where: the file that names it, for the message.

    Raises:
        ConfigError: no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f'{where}: backend is "{name}"; known backends are {", ".join(BACKENDS)}')
    return _loaded(name)


def all_backends() -> Iterator[tuple[str, Backend]]:
    """Give every backend with its name."""
    for name in BACKENDS:
        yield name, _loaded(name)


def _loaded(name: str) -> Backend:
    found = BACKENDS[name]
    return cast(Backend, import_module(found)) if isinstance(found, str) else found
