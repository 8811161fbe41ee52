"""Take apart the operators that ONNX Runtime's optimiser writes, into the dialect's.

Each entry of `_EXPANSIONS` writes the standard form of one operator of the domain com.microsoft before the node, and
gives what stands for each output that is read. Source: onnxruntime 1.31, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from edgeq.errors import Unsupported
from edgeq.frontend.onnx.read import CONTRIB
from edgeq.graph.edit import add_constant, add_node, constant, dims, made_by, replace_uses

_FILTER = -10000.0


class _Resists(Exception):
    """Say why an operator cannot be taken apart."""


@dataclass(frozen=True)
class _Place:
    """Write nodes and constants before a node, named after it."""

    graph: ir.Graph
    node: ir.Node

    @property
    def name(self) -> str:
        return self.node.name or str(self.node.outputs[0].name)

    def input(self, position: int) -> ir.Value | None:
        return self.node.inputs[position] if position < len(self.node.inputs) else None

    def needed(self, position: int) -> ir.Value:
        value = self.input(position)
        if value is None:
            raise _Resists(f"its input {position} is not there")
        return value

    def refuse_inputs(self, *positions: int) -> None:
        for position in positions:
            if self.input(position) is not None:
                raise _Resists(f"its input {position} is used, which edgeq does not know how to write")

    def attribute(self, name: str, default: Any) -> Any:
        return self.node.attributes[name].value if name in self.node.attributes else default

    def array(self, position: int) -> NDArray[np.float32]:
        array = constant(self.input(position))
        if array is None:
            raise _Resists(f"its input {position} is computed; constant weights are needed")
        return np.asarray(array, np.float32)

    def put(self, name: str, array: NDArray[Any]) -> ir.Value:
        return add_constant(self.graph, f"{self.name}/{name}", array)

    def ints(self, name: str, *numbers: int) -> ir.Value:
        return self.put(name, np.array(numbers, np.int64))

    def add(self, op_type: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        return add_node(self.node, op_type, inputs, f"{self.name}/{name}", attributes)


_Expansion = Callable[[_Place], "dict[int, ir.Value]"]


def expand_fused(model: ir.Model, name: str) -> int:
    """Take apart every operator of ONNX Runtime's own domain; give how many there were.

    Raises:
        Unsupported: with every operator that cannot be.
    """
    count, problems = 0, []
    for node in list(model.graph):
        if node.domain != CONTRIB:
            continue
        place = _Place(model.graph, node)
        try:
            if node.op_type not in _EXPANSIONS:
                raise _Resists("edgeq does not know how to write it in standard operators")
            outputs = _EXPANSIONS[node.op_type](place)
            for position, output in enumerate(node.outputs):
                if position in outputs:
                    replace_uses(output, outputs[position])
                elif output.uses() or output.is_graph_output():
                    raise _Resists(f"its output {position} is read")
        except _Resists as reason:
            problems.append(f"  - {place.name}: {node.op_type}: {reason}")
        count += 1
    if problems:
        raise Unsupported(
            f"{name}: holds operators of ONNX Runtime's own that cannot be taken apart:\n"
            + "\n".join(problems)
            + "\nExport the model again without optimisation (no -O level, no optimizer.optimize_model, graph "
            "optimisation off), or give the file from before it was optimised."
        )
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    return count


def _skip_layer_normalization(place: _Place) -> dict[int, ir.Value]:
    total = _skip_sum(place, bias_at=4)
    beta = place.input(3) or place.put("beta", np.zeros_like(place.array(2)))
    attributes = {"axis": -1, "epsilon": place.attribute("epsilon", 1e-12)}
    return {0: place.add("LayerNormalization", [total, place.needed(2), beta], "norm", **attributes), 3: total}


def _skip_sum(place: _Place, bias_at: int) -> ir.Value:
    x, bias = place.needed(0), place.input(bias_at)
    x = x if bias is None else place.add("Add", [x, bias], "biased")  # to the product first, whose bias it is
    return place.add("Add", [x, place.needed(1)], "sum")


def _root_mean_square(place: _Place, x: ir.Value, gain: ir.Value) -> ir.Value:
    square = place.add("Mul", [x, x], "square")
    mean = place.add("ReduceMean", [square, place.ints("last", -1)], "mean", keepdims=1)
    epsilon = place.put("epsilon", np.array(place.attribute("epsilon", 1e-5), np.float32))
    root = place.add("Sqrt", [place.add("Add", [mean, epsilon], "mean_and_epsilon")], "root")
    return place.add("Mul", [place.add("Div", [x, root], "unit"), gain], "norm")


def _simplified(place: _Place) -> dict[int, ir.Value]:
    if place.attribute("axis", -1) != -1:
        raise _Resists("it normalises another axis than the last")
    return {0: _root_mean_square(place, place.needed(0), place.needed(1))}


def _skip_simplified(place: _Place) -> dict[int, ir.Value]:
    total = _skip_sum(place, bias_at=3)
    return {0: _root_mean_square(place, total, place.needed(2)), 3: total}


def _embed_layer_normalization(place: _Place) -> dict[int, ir.Value]:
    ids = place.add("Cast", [place.needed(0)], "ids", to=int(ir.DataType.INT64))
    total = place.add("Gather", [place.needed(2), ids], "words")
    if place.input(8) is not None:
        positions = place.add("Cast", [place.needed(8)], "position_ids", to=int(ir.DataType.INT64))
        rows = place.add("Gather", [place.needed(3), positions], "positions")
    else:
        table = place.put("position_rows", place.array(3)[None])
        length = place.add("Shape", [ids], "length", start=1, end=2)
        rows = place.add("Slice", [table, place.ints("start", 0), length, place.ints("axis", 1)], "positions")
    total = place.add("Add", [total, rows], "words_and_positions")
    if place.input(1) is not None:
        segments = place.add("Cast", [place.needed(1)], "segment_ids", to=int(ir.DataType.INT64))
        total = place.add("Add", [total, place.add("Gather", [place.needed(4), segments], "segments")], "sum")
    attributes = {"axis": -1, "epsilon": place.attribute("epsilon", 1e-12)}
    norm = place.add("LayerNormalization", [total, place.needed(5), place.needed(6)], "norm", **attributes)
    mask = place.input(7)
    return {0: norm, 2: total} | ({1: mask} if mask is not None else {})  # Attention reads a whole mask as well


def _gelu(kind: str, has_bias: bool) -> _Expansion:
    def expansion(place: _Place) -> dict[int, ir.Value]:
        x, bias = place.needed(0), place.input(1) if has_bias else None
        x = x if bias is None else place.add("Add", [x, bias], "biased")
        return {0: place.add("Gelu", [x], "gelu", **({"approximate": kind} if kind != "none" else {}))}

    return expansion


def _quick_gelu(place: _Place) -> dict[int, ir.Value]:
    alpha = place.put("alpha", np.array(place.attribute("alpha", 1.702), np.float32))
    gate = place.add("Sigmoid", [place.add("Mul", [place.needed(0), alpha], "scaled")], "gate")
    return {0: place.add("Mul", [place.needed(0), gate], "gated")}


def _fused_matmul(place: _Place) -> dict[int, ir.Value]:
    if place.attribute("transBatchA", 0) or place.attribute("transBatchB", 0):
        raise _Resists("it transposes batches")
    sides = [_turned(place, 0, "transA"), _turned(place, 1, "transB")]
    product = place.add("MatMul", sides, "product")
    alpha = place.attribute("alpha", 1.0)
    if alpha != 1.0:
        product = place.add("Mul", [product, place.put("alpha", np.array(alpha, np.float32))], "scaled")
    return {0: product}


def _turned(place: _Place, position: int, flag: str) -> ir.Value:
    value = place.needed(position)
    if not place.attribute(flag, 0):
        return value
    array = constant(value)
    if array is not None:
        return place.put(f"{flag}_weight", np.swapaxes(array, -1, -2))
    producer, shape = made_by(value, "Transpose"), dims(value)
    rank = len(shape) if shape is not None else len(producer.attributes["perm"].as_ints()) if producer else 0
    if rank < 2:
        raise _Resists(f"{flag} of a value whose rank is not known")
    order = [*range(rank - 2), rank - 1, rank - 2]
    return place.add("Transpose", [value], flag, perm=order)


def _fused_gemm(place: _Place) -> dict[int, ir.Value]:
    activation = place.attribute("activation", "")
    if activation not in ("Relu", "Tanh", "Sigmoid"):
        raise _Resists(f"its activation is {activation!r}")
    kept = {key: place.attribute(key, default) for key, default in (("alpha", 1.0), ("beta", 1.0))}
    turns = {key: place.attribute(key, 0) for key in ("transA", "transB")}
    inputs = [value for value in place.node.inputs if value is not None]
    return {0: place.add(activation, [place.add("Gemm", inputs, "gemm", **kept, **turns)], "activated")}


def _attention(place: _Place) -> dict[int, ir.Value]:
    place.refuse_inputs(4, 6)
    weight, sizes = place.array(1), place.attribute("qkv_hidden_sizes", None)
    third = weight.shape[1] // 3
    ends = np.cumsum(sizes if sizes is not None else [third] * 3)[:2].tolist()
    biases = np.split(place.array(2), ends) if place.input(2) is not None else [None] * 3
    parts = []
    for name, columns, bias in zip(("query", "key", "value"), np.split(weight, ends, axis=1), biases, strict=True):
        kept = np.ascontiguousarray(columns)
        part = place.add("MatMul", [place.needed(0), place.put(f"{name}.weight", kept)], f"{name}.product")
        if bias is not None:
            part = place.add("Add", [part, place.put(f"{name}.bias", bias)], f"{name}.sum")
        parts.append(part)
    width = ends[0]
    return {0: _attend(place, parts, width, kept.shape[1], place.input(3), place.input(5))}


def _multi_head_attention(place: _Place) -> dict[int, ir.Value]:
    place.refuse_inputs(6, 7, 8, 9)
    parts = [place.needed(position) for position in range(3)]
    widths = [(dims(part) or [None])[-1] for part in parts]
    if place.input(3) is not None:
        bias = place.array(3)
        third = len(bias) // 3
        known = [width if isinstance(width, int) else third for width in widths]
        widths = [*known]
        rows = np.split(bias, np.cumsum(known)[:2].tolist())
        parts = [
            place.add("Add", [part, place.put(f"{name}.bias", row)], f"{name}.sum")
            for name, part, row in zip(("query", "key", "value"), parts, rows, strict=True)
        ]
    if not isinstance(widths[0], int) or not isinstance(widths[2], int):
        raise _Resists("the width of its query is not known")
    return {0: _attend(place, parts, widths[0], widths[2], place.input(4), place.input(5))}


def _attend(
    place: _Place, parts: list[ir.Value], width: int, value_width: int, mask: ir.Value | None, bias: ir.Value | None
) -> ir.Value:
    """Write attention over query, key and value, each [batch, sequence, width]."""
    if place.attribute("unidirectional", 0) or place.attribute("do_rotary", 0):
        raise _Resists("it is causal, or rotates positions")
    heads = place.attribute("num_heads", 0)
    split = []
    for name, part, size, order in (
        ("query", parts[0], width, [0, 2, 1, 3]),
        ("key", parts[1], width, [0, 2, 3, 1]),
        ("value", parts[2], value_width, [0, 2, 1, 3]),
    ):
        shaped = place.add("Reshape", [part, place.ints(f"{name}_shape", 0, 0, heads, size // heads)], f"{name}_heads")
        split.append(place.add("Transpose", [shaped], f"{name}_turned", perm=order))
    scores = place.add("MatMul", split[:2], "scores")
    scale = place.attribute("scale", 0.0) or (width // heads) ** -0.5
    scores = place.add("Mul", [scores, place.put("scale", np.array(scale, np.float32))], "scaled")
    if bias is not None:
        scores = place.add("Add", [scores, bias], "biased")
    if mask is not None:
        scores = place.add("Add", [scores, _mask_bias(place, mask)], "masked")
    context = place.add("MatMul", [place.add("Softmax", [scores], "shares", axis=-1), split[2]], "context")
    turned = place.add("Transpose", [context], "context_turned", perm=[0, 2, 1, 3])
    return place.add("Reshape", [turned, place.ints("context_shape", 0, 0, value_width)], "attended")


def _mask_bias(place: _Place, mask: ir.Value) -> ir.Value:
    """Write what a mask[batch, sequence] of ones and zeros adds to the scores."""
    if len(dims(mask) or [0, 0]) != 2:
        raise _Resists("its mask is no [batch, sequence] of ones and zeros")
    ones = place.add("Cast", [mask], "mask_ones", to=int(ir.DataType.FLOAT))
    row = place.add("Unsqueeze", [ones, place.ints("mask_axes", 1, 2)], "mask_row")
    shifted = place.add("Sub", [row, place.put("one", np.array(1, np.float32))], "mask_shifted")
    size = place.put("mask_filter", np.array(-place.attribute("mask_filter_value", _FILTER), np.float32))
    return place.add("Mul", [shifted, size], "mask_bias")


_EXPANSIONS: dict[str, _Expansion] = {
    "Attention": _attention,
    "BiasGelu": _gelu("none", has_bias=True),
    "EmbedLayerNormalization": _embed_layer_normalization,
    "FastGelu": _gelu("tanh", has_bias=True),
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu("none", has_bias=False),
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _simplified,
    "SkipLayerNormalization": _skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "TransposeMatMul": _fused_matmul,
}
