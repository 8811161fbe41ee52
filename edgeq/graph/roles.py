"""Note beside a node of a graph what a rewrite made it for, so that later stages ask instead of guessing.

A role says what an operator's type and operands cannot: that a product belongs to the outlier branch, or that the
weights of a product add up to one. Roles stand in a node's ONNX metadata, so that copying a model and saving it keeps
them; `strip` takes them out of a model that is shipped. A name of a node or tensor is for people and decides nothing.
"""

from __future__ import annotations

from enum import StrEnum

import onnx
import onnx_ir as ir

KEY = "edgeq.role"


class Role(StrEnum):
    """Name each role; a node may have several, and its metadata hold the values with a space between."""

    ATTENTION_MASK = "attention-mask"
    """Mul that makes what is added to attention scores: 0 for tokens, -size for padding and where no query may look."""
    POOLING = "pooling"
    """MatMul of weights of the tokens, which add up to one in each text, with the tokens."""
    PICKED_TOKEN = "picked-token"
    """MatMul that takes the last token of each text: its weights are 1 there and 0 elsewhere."""
    TOKEN_SCALED = "token-scaled"
    """Div of each token by its largest value, in front of QuantizeLinear: the product behind it is multiplied by it."""
    SMOOTHED = "smoothed"
    """Mul by one factor a channel that stands for SmoothQuant's division, where no weights could take it in."""
    OUTLIER_BRANCH = "outlier-branch"
    """Operator of the small copy of a feed-forward block that holds the neurons with outlier activations."""
    OUTLIER_SUM = "outlier-sum"
    """Add of a feed-forward block and its outlier branch."""
    NORM_NORMALIZED = "norm-normalized"
    """Mul of a decomposed LayerNormalization or RMSNorm: the centred row times one over its length."""
    NORM_GAIN = "norm-gain"
    """Mul of a decomposed LayerNormalization or RMSNorm by its gain."""
    NORM_BIAS = "norm-bias"
    """Add of a decomposed LayerNormalization's bias."""
    ROW_FACTOR = "row-factor"
    """Mul of one over a row's length with a gain: the factor of a product that is summed in int32."""
    ZERO_ONE_PRODUCT = "zero-one-product"
    """MatMul with a constant of zeros and ones, which picks channels or adds them up."""
    TEXT_PRODUCT = "text-product"
    """Gemm that has one row a text, such as a Dense layer behind the pooling."""
    SINGLE_TOKEN = "single-token"
    """Operator of the last layer that computes nothing but the token that becomes the vector."""
    FLAT_TOKENS = "flat-tokens"
    """Reshape from [batch, sequence, channels] to the flat list [tokens, channels]."""
    INT32_SUM = "int32-sum"
    """Add, Sub or Mul of quantised tensors that is computed in int32 and rounded at most once, behind the last Add."""
    SOFTMAX_MAXIMUM = "softmax-maximum"
    """ReduceMax that finds the largest score of each row, for exp(score - maximum)."""
    SOFTMAX_DIFFERENCE = "softmax-difference"
    """Sub of a row's largest 16-bit score, exact in int32."""
    SOFTMAX_EXPONENTIAL = "softmax-exponential"
    """Exp of 16-bit scores less the largest of their row, from a table."""
    SOFTMAX_SUM = "softmax-sum"
    """ReduceSum that adds up the exponentials of each row, which are not divided by it before the next MatMul."""
    SOFTMAX_INDEX = "softmax-index"
    """Min that gives the place of a row's sum in a table of its inverses."""
    SOFTMAX_INVERSE = "softmax-inverse"
    """Gather of one over a row's sum from a table, 0 outside of the table's level."""
    SOFTMAX_DIVISOR = "softmax-divisor"
    """Add of one over a row's sum from the tables of two levels, one of which gives 0."""
    SOFTMAX_QUOTIENT = "softmax-quotient"
    """Mul of 16-bit values of exp with one over their row's sum, in int32 and rounded once."""
    MASKED_SCORES = "masked-scores"
    """Add of the mask to 16-bit scores that is not rounded: what it shuts out lies below all that int16 holds."""
    POOLING_WEIGHTS = "pooling-weights"
    """QuantizeLinear, or Transpose before it, of the weight that a pooling gives each token by the attention mask."""
    PADDING_CAP = "padding-cap"
    """QuantizeLinear of what max pooling holds padding down with, which follows from the attention mask."""


_KNOWN = frozenset(Role)


def give(node: ir.Node, *roles: Role) -> None:
    """Add roles to those that a node has."""
    node.metadata_props[KEY] = " ".join(sorted({*of(node), *roles}))


def of(node: ir.Node) -> frozenset[Role]:
    """Give the roles of a node; what this version of edgeq does not know is left out."""
    return frozenset(Role(name) for name in node.metadata_props.get(KEY, "").split() if name in _KNOWN)


def has(node: ir.Node | None, role: Role) -> bool:
    """Tell whether there is a node, and it has a role."""
    return node is not None and role in of(node)


def hand_over(old: ir.Node, new: ir.Node) -> None:
    """Give the roles of a node to the one that takes its place."""
    if of(old):
        give(new, *of(old))


def note(node: onnx.NodeProto, *roles: Role) -> None:
    """Give roles to a node of an ONNX model that has none yet."""
    node.metadata_props.add(key=KEY, value=" ".join(sorted(roles)))


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take the roles out of an ONNX model, and give it back: what is shipped holds none."""
    for node in model.graph.node:
        kept = [item for item in node.metadata_props if item.key != KEY]
        if len(kept) < len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
    return model
