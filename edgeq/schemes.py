"""List the schemes: which tensors are integer, in how many bits."""

from __future__ import annotations

from edgeq.errors import ConfigError
from edgeq.records import Scheme

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="w8a8-gemm",
            weight_bits=8,
            activation_bits=8,
            activations_signed=False,
            embedding_bits=8,
            range_method="minmax",
        ),
        Scheme(
            name="w8a8-gemm-7bit",
            weight_bits=7,
            activation_bits=8,
            activations_signed=False,
            embedding_bits=8,
            range_method="minmax",
        ),
    )
}


def find(name: str, where: str) -> Scheme:
    """Give a scheme by name.

    Raises:
        ConfigError: no such scheme.
    """
    if name not in SCHEMES:
        raise ConfigError(f'{where}: scheme is "{name}"; known schemes are {", ".join(SCHEMES)}')
    return SCHEMES[name]
