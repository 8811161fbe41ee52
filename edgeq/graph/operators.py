"""State once, for each ONNX operator, what edgeq knows of it: why it is there, what kind it is, and who takes it.

Every set of operators in edgeq is derived from this table. `docs/contributing/add-an-operator.md` says which files a
new operator touches, and tests/test_operators.py fails until all of them know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "linear",  # MatMul, Gemm and Conv
    "arithmetic",  # each element from the same element of two or more operands, which broadcast
    "function",  # each element from the same element of one operand
    "activation",  # the same, between two weight products of a feed-forward block
    "comparison",  # truth values from the same elements of the operands
    "layout",  # all elements of the first operand, each once, under other axes
    "selection",  # some elements of the first operand
    "repetition",  # all elements of the first operand, more than once
    "joining",  # the elements of several operands
    "extremum",  # the largest element along an axis or in a window: a number that is there already
    "reduction",  # new numbers from all elements along an axis or in a window
    "normalization",  # the shape stays, and each element depends on all along an axis
    "index",  # whole numbers: sizes and positions
    "cast",  # the same numbers in another dtype
    "quantization",  # from float to integers and back
]
# How a quantiser takes an operator that it meets in a float model:
Support = Literal[
    "",  # not at all: it is refused
    "computed",  # by a function of its own, which gives the output a scale
    "copied",  # with the scale and zero point of its first operand: no function of its own is needed
    "joined",  # by the function of the operator before it: the two have one scale, behind the second
    "rewritten",  # by a function of its own, where one of edgeq's rewrites wrote it; a model's own is refused
    "inserted",  # not at all; the quantiser itself writes it, between integers
]
# Whether an operator may compute on [tokens, channels] instead of [batch, sequence, channels]:
TokenList = Literal[
    "",  # no
    "begins",  # yes, and the operators behind it may follow
    "follows",  # yes, where the operator before it does
]


@dataclass(frozen=True)
class Operator:
    """Hold what edgeq knows of one ONNX operator.

    Attributes:
        kind: what its output is made of.
        why: why a float model may hold it; empty where the dialect leaves it out.
        written_by: what writes it where it is in no float model, or how it gets there besides.
        observed: whether calibration keeps statistics of its output. It does where a quantiser computes the scale from
            them; it does not where the scale is copied, fixed (Softmax) or given by a rewrite. The largest score of a
            row (ReduceMax) has its operand's scale, and is observed to tell how far down a masked score must lie.
        integer: how the integer-only quantiser takes it.
        htp: how the quantiser for HTP takes it. HTP keeps LayerNormalization, RMSNorm and the unit length whole, so
            that it needs neither means nor roots.
        token_list: whether it may compute on a flat list of tokens, between two Gemm. Sub, Div and Pow may not: in
            models that have them between products they are parts of RMSNorm, whose mean needs the three axes again.
    """

    kind: Kind
    why: str = ""
    written_by: str = ""
    observed: bool = False
    integer: Support = ""
    htp: Support = ""
    token_list: TokenList = ""


_DENSE = "activation of a Dense"  # what torch's activations are made of

# fmt: off
OPERATORS: Mapping[str, Operator] = {
    # Weights, attention, pooling.
    "Conv": Operator("linear", "maps of an image", integer="computed"),
    "Gemm": Operator("linear", written_by="matmul_to_gemm", htp="computed"),
    "MatMul": Operator(
        "linear", "weights, attention, pooling", observed=True, integer="computed", htp="computed", token_list="begins"
    ),

    "Add": Operator(
        "arithmetic", "bias, residual, mask, positions", observed=True, integer="computed", htp="computed",
        token_list="follows",
    ),
    "Div": Operator(
        "arithmetic", "pooling, normalisation", "deferred_softmax, mish_by_sigmoid", integer="inserted",
        htp="rewritten",
    ),
    "Max": Operator("arithmetic", "divisors kept off zero"),
    "Min": Operator(
        "arithmetic", "distances between positions in buckets", "where_to_min", integer="rewritten", htp="rewritten"
    ),
    "Mul": Operator(
        "arithmetic", "scales, gates", observed=True, integer="computed", htp="computed", token_list="follows"
    ),
    "Pow": Operator("arithmetic", "activations, squares"),
    "Sub": Operator("arithmetic", "mask", observed=True, integer="computed", htp="computed"),
    "Where": Operator("arithmetic", "max pooling"),

    "Abs": Operator("function", "distances between positions"),
    "Ceil": Operator("function", "distances between positions in buckets"),
    "Clip": Operator("function", "divisors kept off zero", "npu_operators", integer="rewritten"),
    "Cos": Operator("function", "rotation by position"),
    "Exp": Operator("function", written_by="deferred_softmax", integer="inserted"),
    "Log": Operator("function", "distances between positions in buckets"),
    "Neg": Operator("function", "pooling of the last token, rotation by position", "mish_by_sigmoid", htp="computed"),
    "Reciprocal": Operator(
        "function", "normalisation by the root of the mean square", "norm_parts", observed=True, integer="joined"
    ),
    "Round": Operator("function", written_by="deferred_softmax", integer="inserted"),
    "Sign": Operator("function", "distances between positions"),
    "Sin": Operator("function", "rotation by position"),
    "Sqrt": Operator(
        "function", "mean_sqrt_len pooling, normalisation by the root of the mean square", "norm_parts",
        integer="computed",
    ),

    "Celu": Operator("activation", _DENSE),
    "Elu": Operator("activation", _DENSE),
    "Erf": Operator("activation", "activations that are not GELU"),
    "Gelu": Operator("activation", "activation", observed=True, integer="computed", htp="computed"),
    "HardSigmoid": Operator("activation", "activation, gates of maps"),
    "HardSwish": Operator("activation", "activation"),
    "LeakyRelu": Operator("activation", _DENSE),
    "Mish": Operator("activation", _DENSE, observed=True),
    "PRelu": Operator("activation", _DENSE),
    "Relu": Operator("activation", "activation", observed=True, integer="computed", htp="computed"),
    "Selu": Operator("activation", _DENSE),
    "Sigmoid": Operator("activation", "activation, gates", observed=True, integer="computed", htp="computed"),
    "Softplus": Operator("activation", _DENSE),
    "Tanh": Operator("activation", "activation, Dense", observed=True, integer="computed", htp="computed"),

    "And": Operator("comparison", "pooling of the last token"),
    "Equal": Operator("comparison", "pooling of the last token"),
    "Greater": Operator("comparison", "distances between positions"),
    "GreaterOrEqual": Operator("comparison", "distances between positions"),
    "Less": Operator("comparison", "distances between positions"),
    "LessOrEqual": Operator("comparison", "causal and local attention"),
    "Not": Operator("comparison", "pooling masks"),
    "Or": Operator("comparison", "local attention"),

    # What moves values without changing them.
    "Identity": Operator("layout", "Dense without activation"),
    "Reshape": Operator("layout", "heads", integer="copied", htp="copied"),
    "Squeeze": Operator("layout", "pooling", integer="copied", htp="copied"),
    "Transpose": Operator("layout", "heads", integer="computed", htp="copied"),  # of pixels the scale is known
    "Unsqueeze": Operator("layout", "mask", integer="copied", htp="copied"),
    # Of a table's rows the scale is computed, of a tensor's it is copied.
    "Gather": Operator("selection", "embedding tables, first token", integer="computed", htp="computed"),
    "GatherElements": Operator("selection", "pooling of the last token, products by distance", htp="computed"),
    "GatherND": Operator("selection", "pooling of the last token"),
    "Slice": Operator("selection", "positions, first token", integer="computed", htp="computed"),
    "Split": Operator("selection", "heads, gates"),
    "Expand": Operator("repetition", "pooling"),
    "Tile": Operator(
        "repetition", "projections of positions for each head, the query of a pooling head for each image"
    ),
    "Concat": Operator("joining", "pooling modes side by side, class token", integer="computed"),
    "Pad": Operator("joining", written_by="raw_pixels", integer="computed"),
    "ScatterElements": Operator("joining", "pooling of the last token"),
    "MaxPool": Operator("extremum", "maps of an image", integer="computed"),
    "ReduceMax": Operator(
        "extremum", "max pooling", "observe_row_maxima, deferred_softmax", observed=True, integer="copied",
        htp="copied",
    ),

    "AveragePool": Operator("reduction", "maps of an image", integer="computed"),
    "GlobalAveragePool": Operator("reduction", "pooling of maps"),
    "ReduceL2": Operator("reduction", "unit length"),
    "ReduceMean": Operator("reduction", "pooling", "decompose_layer_normalization", observed=True, integer="computed"),
    "ReduceSum": Operator("reduction", "pooling", "npu_operators, deferred_softmax", integer="rewritten"),
    "ReduceSumSquare": Operator("reduction", written_by="norm_parts", observed=True, integer="computed"),
    "LayerNormalization": Operator(
        "normalization", "normalisation inside the encoder", htp="computed", token_list="begins"
    ),
    "LogSoftmax": Operator("normalization", _DENSE),
    "LpNormalization": Operator("normalization", written_by="unit_length_to_lp_normalization", htp="computed"),
    "RMSNormalization": Operator(
        "normalization", written_by="rms_norm_to_operator", htp="computed", token_list="begins"
    ),
    "Softmax": Operator("normalization", "attention", integer="computed", htp="computed"),

    "ArgMax": Operator("index", "pooling of the last token"),
    "CumSum": Operator("index", "weighted mean pooling, positions of tokens that are no padding"),
    "Range": Operator("index", "positions"),
    "Shape": Operator("index", "symbolic sizes"),
    "Cast": Operator("cast", "mask to float", "deferred_softmax", integer="inserted", token_list="follows"),
    "DequantizeLinear": Operator("quantization", written_by="the quantisers", token_list="follows"),
    "QuantizeLinear": Operator("quantization", written_by="the quantisers", token_list="begins"),
}
# fmt: on


def of_kind(*kinds: Kind) -> frozenset[str]:
    """Name the operators of some kinds."""
    return frozenset(name for name, row in OPERATORS.items() if row.kind in kinds)


def _with_integer(*supports: Support) -> frozenset[str]:
    return frozenset(name for name, row in OPERATORS.items() if row.integer in supports)


def _with_htp(*supports: Support) -> frozenset[str]:
    return frozenset(name for name, row in OPERATORS.items() if row.htp in supports)


DIALECT: Mapping[str, str] = {name: row.why for name, row in OPERATORS.items() if row.why}
OBSERVED = frozenset(name for name, row in OPERATORS.items() if row.observed)

# What a model that is quantised already holds, besides the operators of kind "quantization".
QUANTIZED = of_kind("quantization") | {
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
}  # fmt: skip
# What draws anew each time; Dropout does where it is left in training mode.
RANDOM = frozenset({
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
})  # fmt: skip

ACTIVATIONS = of_kind("activation")
ELEMENTWISE = of_kind("arithmetic", "function", "activation")
BROADCASTING = of_kind("arithmetic")  # without comparisons: what makes masks is recognised with its Expand
REDUCING = (of_kind("reduction") | {"ReduceMax"}) - {"GlobalAveragePool"}  # along axes that the node names
LAYOUT = of_kind("layout")
MOVEMENT = of_kind("layout", "selection", "repetition")  # each output element is one of the first operand's
LINEAR_IN_FIRST = MOVEMENT | {"Neg"}
SAME_VALUES = MOVEMENT | of_kind("cast")  # a constant that is one number throughout stays one

# A quantised copy of these needs no scale of its own.
_SCALE_STAYS = MOVEMENT | of_kind("extremum")
INTEGER_COPIED = _SCALE_STAYS & _with_integer("copied", "computed")
HTP_COPIED = _SCALE_STAYS & _with_htp("copied", "computed")
INTEGER_COMPUTED = _with_integer("computed", "rewritten")
HTP_COMPUTED = _with_htp("computed", "rewritten")
INTEGER = _with_integer("computed", "copied", "joined", "rewritten", "inserted")  # what an integer-only model may hold
HTP = _with_htp("computed", "copied", "joined", "rewritten")

TOKEN_LIST_BEGINS = frozenset(name for name, row in OPERATORS.items() if row.token_list == "begins")
TOKEN_LIST = ACTIVATIONS | frozenset(name for name, row in OPERATORS.items() if row.token_list)
