"""List the schemes: which tensors are integer, in how many bits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from edgeq.errors import ConfigError
from edgeq.records import HtpForm, IntegerForm, Scheme, VendorForm

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
            integer=IntegerForm(
                gemm_bits=8,
                attention_bits=8,
                output_bits=8,
                sum_bits=32,
                shares="exact",
                widen_quantile=0.5,
                wide_matmul=True,
                wide_gelu=True,
                tables=True,
            ),
        ),
        Scheme(
            name="w8a8-int-npu",
            weight_bits=8,
            activation_bits=8,
            activations_signed=True,
            embedding_bits=8,
            range_method="minmax",
            integer=IntegerForm(
                gemm_bits=8,
                attention_bits=8,
                output_bits=8,
                sum_bits=16,
                shares="softmax",
                widen_quantile=0.5,
                wide_matmul=False,
                wide_gelu=False,
                tables=False,
            ),
        ),
        Scheme(
            name="w8a16-int",
            weight_bits=8,
            activation_bits=16,
            activations_signed=True,
            embedding_bits=8,
            range_method="minmax",
            integer=IntegerForm(
                gemm_bits=16,
                attention_bits=16,
                output_bits=8,
                sum_bits=32,
                shares="softmax",
                widen_quantile=1.0,
                wide_matmul=True,
                wide_gelu=True,
                tables=True,
            ),
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
        Scheme(
            name="rockchip-int8",
            weight_bits=8,
            activation_bits=8,
            activations_signed=True,
            embedding_bits=8,
            range_method="minmax",
            vendor=VendorForm(opset=19, dtype="int8", feeds=64, output_ratio_max=10.0),
        ),
        Scheme(
            name="rockchip-float16",
            weight_bits=16,
            activation_bits=16,
            activations_signed=True,
            embedding_bits=16,
            range_method="minmax",
            vendor=VendorForm(opset=19, dtype="float16", feeds=0, output_ratio_max=10.0),
        ),
    )
}


SEPARATOR = "+"  # between the name of a scheme and how many products are raised


def base_name(scheme: Scheme) -> str:
    """Give the name of a scheme without what is raised in it: the one that targets give."""
    return scheme.name.split(SEPARATOR)[0]


def raising(scheme: Scheme, products: Iterable[str]) -> Scheme:
    """Give a scheme that differs in these products, named so."""
    names = tuple(sorted(products))
    base = base_name(scheme)
    name = f"{base}{SEPARATOR}{len(names)}" if names else base
    return scheme.model_copy(update={"name": name, "raised": names})


def read(path: Path) -> Scheme:
    """Read a scheme that `edgeq analyze --auto` wrote.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        found = Scheme.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: is no scheme: {error}. Give a file that edgeq analyze --auto wrote.") from error
    base = SCHEMES.get(base_name(found))
    if base is None or found != raising(base, found.raised):
        raise ConfigError(
            f'{path}: the scheme "{found.name}" differs from those of this edgeq in more than its raised products. '
            "Run edgeq analyze --auto again."
        )
    return found


def find(name: str, where: str) -> Scheme:
    """Give a scheme by name.

    Raises:
        ConfigError: no such scheme.
    """
    if name not in SCHEMES:
        raise ConfigError(f'{where}: scheme is "{name}"; known schemes are {", ".join(SCHEMES)}')
    return SCHEMES[name]
