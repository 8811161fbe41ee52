"""Hold what is known while one graph is quantised to signed integers."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.roles import Role
from edgeq.quantization.affine import Affine
from edgeq.quantization.integer.deferred_softmax import DeferredSoftmax
from edgeq.quantization.integer.int32_sums import Int32Sums
from edgeq.quantization.walk import Walk
from edgeq.records import IntegerSpec

POOLING_WEIGHT = Affine(1 / 32767, 0, -32768, 32767)  # of a token in the mean


@dataclass(kw_only=True)
class IntegerWalk(Walk):
    """Hold what is known while one graph is quantised to signed integers.

    Attributes:
        spec: bits of products, attention and the rest.
        promoted: names of the weight products that read and give 16 bits.
        sums: writes sums in int32, where the scheme has them.
        softmaxes: writes softmax with its division behind the product with the values, where the scheme has it.
        masked: sums of 16-bit scores and the mask, which are not rounded, with the parameters of the scores.
    """

    spec: IntegerSpec
    promoted: frozenset[str]
    sums: Int32Sums | None
    softmaxes: DeferredSoftmax | None
    masked: dict[ir.Value, Affine] = field(default_factory=dict)


def is_single_token(node: ir.Node, spec: IntegerSpec) -> bool:
    """Tell whether a node computes one token, where whatever has one row may have 16 bits."""
    return roles.has(node, Role.SINGLE_TOKEN) and spec.has_16bit_matmul and spec.has_16bit_gelu


def attention_bits(walk: IntegerWalk, node: ir.Node) -> int:
    """Give the bits of scores, probabilities and values: 16 for one token, else what the scheme says."""
    return 16 if is_single_token(node, walk.spec) else walk.spec.attention_bits
