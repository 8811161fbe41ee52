"""Decide which TFLite operators an Ethos-U leaves to the host; each rule's docstring is the reason shown.

Source: ethos-u-vela 5.2.0, `vela --supported-ops-report`; compared with what Vela really does in every lowering.
"""

from __future__ import annotations

from collections.abc import Callable

Rule = Callable[[str, str, str], str | None]

_NEVER = {"FILL": "it makes no tensor from a number", "RIGHT_SHIFT": "it shifts no tensor"}
_WITHOUT_LOOKUP = ("ethos-u55", "ethos-u65")


def has_the_operator(name: str, dtype: str, product: str) -> str | None:
    """Vela leaves operators that it does not know to the host."""
    return _NEVER.get(name)


def has_no_lookup(name: str, dtype: str, product: str) -> str | None:
    """Ethos-U55 and U65 have neither GATHER nor CAST: what looks up or changes dtype stays on the host."""
    return f"{product} has no {name}" if name in ("CAST", "GATHER") and product in _WITHOUT_LOOKUP else None


def multiplies_matrices_in_8_bits(name: str, dtype: str, product: str) -> str | None:
    """Ethos-U55 and U65 multiply two computed tensors as matrices in 8 bits only."""
    is_wide = name == "BATCH_MATMUL" and dtype != "int8"
    return f"{name} of {dtype} on {product}" if is_wide and product in _WITHOUT_LOOKUP else None


def has_gelu_in_8_bits(name: str, dtype: str, product: str) -> str | None:
    """An Ethos-U has GELU in 8 bits only."""
    return f"{name} of {dtype}" if name == "GELU" and dtype != "int8" else None


def quantises_no_32_bits(name: str, dtype: str, product: str) -> str | None:
    """Ethos-U55 and U65 compute functions of one tensor and limits in 8 and 16 bits only."""
    is_limited = name in ("MAXIMUM", "MINIMUM", "QUANTIZE", "RELU", "RSQRT", "LOGISTIC", "TANH", "SOFTMAX")
    return f"{name} of {dtype} on {product}" if is_limited and dtype == "int32" and product in _WITHOUT_LOOKUP else None


RULES: tuple[Rule, ...] = (
    has_the_operator, has_no_lookup, multiplies_matrices_in_8_bits, has_gelu_in_8_bits, quantises_no_32_bits,
)  # fmt: skip


def product_of(accelerator: str) -> str:
    """Give an accelerator's product, e.g. "ethos-u55" for "ethos-u55-256"."""
    return accelerator.rpartition("-")[0]


def on_host(name: str, dtype: str, product: str) -> str | None:
    """Give the reason why a TFLite operator stays on the host, or None where the NPU takes it.

    Args:
        name: of the TFLite operator.
        dtype: of its result.
        product: of the accelerator, from `product_of`.
    """
    for rule in RULES:
        if rule(name, dtype, product) is not None:
            return rule.__doc__
    return None
