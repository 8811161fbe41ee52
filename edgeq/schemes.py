"""List the schemes: which tensors are integer, in how many bits."""

from __future__ import annotations

from edgeq.errors import ConfigError
from edgeq.records import HtpForm, IntegerForm, Scheme

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
        Scheme(
            name="w8a8-int",
            weight_bits=8,
            activation_bits=8,
            activations_signed=True,
            embedding_bits=8,
            range_method="minmax",
            integer=IntegerForm(gemm_bits=8, attention_bits=8, output_bits=8, widen_quantile=0.5),
        ),
        Scheme(
            name="w8a16-int",
            weight_bits=8,
            activation_bits=16,
            activations_signed=True,
            embedding_bits=8,
            range_method="minmax",
            integer=IntegerForm(gemm_bits=16, attention_bits=16, output_bits=8, widen_quantile=1.0),
        ),
        Scheme(
            name="w8a8-htp",
            weight_bits=8,
            activation_bits=8,
            activations_signed=False,
            embedding_bits=8,
            range_method="minmax",
            htp=HtpForm(gemm_bits=8, attention_bits=8, widen_quantile=0.5),
        ),
        Scheme(
            name="w8a16-htp",
            weight_bits=8,
            activation_bits=16,
            activations_signed=False,
            embedding_bits=8,
            range_method="minmax",
            htp=HtpForm(gemm_bits=16, attention_bits=16, widen_quantile=1.0),
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
