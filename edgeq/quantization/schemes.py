"""List the schemes: which tensors are integer, in how many bits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from edgeq.errors import ConfigError
from edgeq.records import HtpSpec, IntegerSpec, Scheme, VendorSpec

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="w8a8-gemm", activations_signed=False),
        Scheme(name="w8a8-gemm-7bit", weight_bits=7, activations_signed=False),
        Scheme(name="w8a8-int", spec=IntegerSpec()),
        Scheme(
            name="w8a8-int-npu",
            spec=IntegerSpec(
                sum_bits=16, softmax="normalized", has_16bit_matmul=False, has_16bit_gelu=False, has_16bit_tables=False
            ),
        ),
        Scheme(
            name="w8a16-int",
            activation_bits=16,
            spec=IntegerSpec(gemm_bits=16, attention_bits=16, softmax="normalized", scaled_output_quantile=1.0),
        ),
        Scheme(name="w8a8-htp", activations_signed=False, spec=HtpSpec()),
        Scheme(
            name="w8a16-htp",
            activation_bits=16,
            activations_signed=False,
            spec=HtpSpec(gemm_bits=16, attention_bits=16, scaled_output_quantile=1.0),
        ),
        Scheme(name="rockchip-int8", feeds=64, spec=VendorSpec(opset=19, dtype="int8", output_ratio_max=10.0)),
        Scheme(
            name="rockchip-float16",
            weight_bits=16,
            activation_bits=16,
            embedding_bits=16,
            spec=VendorSpec(opset=19, dtype="float16", output_ratio_max=10.0),
        ),
    )
}


SEPARATOR = "+"  # between the name of a scheme and how many products are promoted


def base_name(scheme: Scheme) -> str:
    """Give the name of a scheme without what is promoted in it: the one that targets give."""
    return scheme.name.split(SEPARATOR)[0]


def promote(scheme: Scheme, products: Iterable[str]) -> Scheme:
    """Give a scheme that computes these weight products at higher precision, and is named after their number."""
    names = tuple(sorted(products))
    base = base_name(scheme)
    name = f"{base}{SEPARATOR}{len(names)}" if names else base
    return scheme.model_copy(update={"name": name, "promoted": names})


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
    if base is None or found != promote(base, found.promoted):
        raise ConfigError(
            f'{path}: the scheme "{found.name}" differs from those of this edgeq in more than its promoted products. '
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
