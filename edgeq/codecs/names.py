"""Parse the names of codecs: `int8`, `binary-itq`, `pca128+int4`, `first256+rabitq2`, `opq32`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgeq.errors import ConfigError

Reduction = Literal["", "first", "pca"]
Rotation = Literal["", "random", "itq", "opq"]
Kind = Literal["float32", "float16", "int8", "int8-vector", "uniform", "ternary", "binary", "rabitq", "pq"]

# Codecs that need statistics of the vectors at most; the others are trained on a sample (see `is_trained`).
PLAIN = (
    "float32", "float16", "int8", "int8-centred", "int8-vector", "int4", "int2", "ternary", "binary",
    "binary-centred", "binary-random", "rabitq", "rabitq2", "rabitq3", "rabitq4",
)  # fmt: skip
_FORM = re.compile(r"(?:(first|pca)([1-9]\d*)\+)?(?:(o?pq)([1-9]\d*)|([a-z0-9-]+))")
_KINDS: dict[str, tuple[Kind, int, Rotation, bool]] = {  # name -> kind, bits, rotation, centred
    "float32": ("float32", 32, "", False),
    "float16": ("float16", 16, "", False),
    "int8": ("int8", 8, "", False),
    "int8-centred": ("int8", 8, "", True),
    "int8-vector": ("int8-vector", 8, "", False),
    "int4": ("uniform", 4, "", False),
    "int2": ("uniform", 2, "", False),
    "ternary": ("ternary", 0, "random", True),
    "binary": ("binary", 1, "", False),
    "binary-centred": ("binary", 1, "", True),
    "binary-random": ("binary", 1, "random", True),
    "binary-itq": ("binary", 1, "itq", True),
    "rabitq": ("rabitq", 1, "random", True),
    "rabitq2": ("rabitq", 2, "random", True),
    "rabitq3": ("rabitq", 3, "random", True),
    "rabitq4": ("rabitq", 4, "random", True),
}


@dataclass(frozen=True)
class CodecName:
    """Hold what a codec's name says.

    Attributes:
        text: the name itself.
        reduction: "first" keeps the first `width` dimensions (Matryoshka), "pca" the first principal components.
        width: of the reduced vector; 0 without a reduction.
        kind: how the numbers are quantised.
        bits: for each dimension; 0 where that is no whole number.
        rotation: what turns the vector before it is quantised.
        is_centred: whether the mean of the vectors is taken off first.
        parts: sub-vectors of a product quantiser, one byte each; 0 of others.
    """

    text: str
    reduction: Reduction
    width: int
    kind: Kind
    bits: int
    rotation: Rotation
    is_centred: bool
    parts: int

    @property
    def is_trained(self) -> bool:
        """Tell whether it is trained on a sample (PCA, ITQ, PQ, OPQ); the others need at most statistics."""
        return self.reduction == "pca" or self.rotation in ("itq", "opq") or self.kind == "pq"

    @property
    def needs_sample(self) -> bool:
        """Tell whether statistics of whole vectors do not suffice: it is trained, or cuts vectors and needs a scale."""
        return self.is_trained or (self.reduction == "first" and self.kind in ("int8", "uniform", "ternary", "rabitq"))


def parse(text: str) -> CodecName:
    """Read a codec's name.

    Raises:
        ConfigError: there is no such codec; the message lists what there is.
    """
    found = _FORM.fullmatch(text)
    if found is not None:
        reduction, width, product, parts, plain = found.groups()
        head: Reduction = "first" if reduction == "first" else "pca" if reduction == "pca" else ""
        if product is not None:
            rotation: Rotation = "opq" if product == "opq" else ""
            return CodecName(text, head, int(width or 0), "pq", 0, rotation, False, int(parts))
        if plain in _KINDS:
            kind, bits, rotation, is_centred = _KINDS[plain]
            return CodecName(text, head, int(width or 0), kind, bits, rotation, is_centred, 0)
    raise ConfigError(
        f"codec {text!r}: is none of {', '.join(_KINDS)}, pqBYTES, opqBYTES, each alone or behind firstN+ or pcaN+. "
        "Choose one of these, such as binary, pq32 or pca128+int4."
    )
