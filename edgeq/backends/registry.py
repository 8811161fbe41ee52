"""List the backends: one module for each runtime."""

from __future__ import annotations

from edgeq.backends import ethos_u, onnxruntime, openvino, qnn, rockchip, tflite
from edgeq.backends.contract import Backend
from edgeq.errors import ConfigError

BACKENDS: dict[str, Backend] = {
    "ethos_u": ethos_u,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "qnn": qnn,
    "rockchip": rockchip,
    "tflite": tflite,
}


def find(name: str, where: str) -> Backend:
    """Give a backend by name.

    Raises:
        ConfigError: no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f'{where}: backend is "{name}"; known backends are {", ".join(BACKENDS)}')
    return BACKENDS[name]
