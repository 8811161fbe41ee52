"""List the schemes: which tensors are integer, in how many bits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from edgeq.errors import ConfigError
from edgeq.records import DynamicSpec, HtpSpec, IntegerSpec, Scheme, VendorSpec, WeightsSpec

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="w8a8-gemm", activations_signed=False),
        Scheme(name="w8a8-gemm-7bit", weight_bits=7, activations_signed=False),
        Scheme(name="w8a8-dynamic", activations_signed=False, spec=DynamicSpec()),
        Scheme(name="w4a8-dynamic", weight_bits=4, embedding_bits=4, activations_signed=False, spec=WeightsSpec()),
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
FLOAT_BITS = 32  # of a table that is not quantised
ALL = "16bit"  # in their place, where every activation has 16 bits

# What computes every activation in 16 bits on the same hardware. Ethos-U has no product of two 16-bit tensors.
_WIDE = {"w8a8-int": "w8a16-int", "w8a8-htp": "w8a16-htp", "rockchip-int8": "rockchip-float16"}


def base_name(scheme: Scheme) -> str:
    """Give the name of a scheme without what is promoted in it: the one that targets give."""
    return scheme.name.split(SEPARATOR)[0]


def promote(
    scheme: Scheme, products: Iterable[str], floats: Iterable[str] = (), has_float_tables: bool = False
) -> Scheme:
    """Give a scheme that computes some weight products at higher precision, and is named after their numbers.

    Args:
        scheme: of a target, or a form of it.
        products: names of those that read 16 bits.
        floats: names of those that keep float32 weights and inputs; only schemes that leave tensors float can.
        has_float_tables: whether the embedding tables stay float32, too.
    """
    names, kept = tuple(sorted(products)), tuple(sorted(floats))
    numbers = ([f"{len(names)}"] if names or kept else []) + ([f"{len(kept)}float"] if kept else [])
    name = SEPARATOR.join([base_name(scheme), *numbers, *(["tables"] if has_float_tables else [])])
    changed: dict[str, object] = {"name": name, "promoted": names, "floats": kept}
    if has_float_tables:
        changed["embedding_bits"] = FLOAT_BITS
    return scheme.model_copy(update=changed)


def widened(scheme: Scheme) -> Scheme | None:
    """Give the form of a scheme with 16 bits in every activation, or None where its hardware has none."""
    base = base_name(scheme)
    if base not in _WIDE:
        return None
    wide = {"name": f"{base}{SEPARATOR}{ALL}", "promoted": (), "floats": ()}
    return SCHEMES[_WIDE[base]].model_copy(update=wide)


def is_form(scheme: Scheme, of: Scheme) -> bool:
    """Tell whether one scheme differs from another in nothing but what is promoted or stays float."""
    has_float_tables = scheme.embedding_bits == FLOAT_BITS
    return scheme in (promote(of, scheme.promoted, scheme.floats, has_float_tables), widened(of))


def reads_8bits(scheme: Scheme) -> bool:
    """Tell whether some weight products of a scheme read 8 bits, so that there is something to promote."""
    if isinstance(scheme.spec, WeightsSpec):  # the file has no codes of activations
        return False
    if isinstance(scheme.spec, IntegerSpec | HtpSpec):
        return scheme.spec.gemm_bits == 8
    return scheme.activation_bits == 8


def promotes_convolutions(scheme: Scheme) -> bool:
    """Tell whether a convolution can read 16 bits like any other product."""
    return isinstance(scheme.spec, IntegerSpec)


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
    if base is None or not is_form(found, base):
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
