"""Expand the fused operators that ONNX Runtime's optimiser writes (domain com.microsoft) to standard operators.

Each entry of `_EXPANSIONS` writes the standard operators before the fused node, and maps positions of its outputs to
the values that replace them. Source: onnxruntime 1.31, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from edgeq.errors import Unsupported
from edgeq.frontend.onnx.fused_attention import attention, multi_head_attention
from edgeq.frontend.onnx.fused_node import CannotExpand, FusedNode
from edgeq.frontend.onnx.read import CONTRIB
from edgeq.graph.edit import constant, dims, made_by, replace_uses

_Expansion = Callable[[FusedNode], "dict[int, ir.Value]"]


def expand_fused(model: ir.Model, name: str) -> int:
    """Expand every operator of the domain com.microsoft, and return their number.

    Args:
        model: is changed.
        name: of the model, for messages.

    Raises:
        Unsupported: some cannot be expanded; the message lists all of them.
    """
    count, problems = 0, []
    for node in list(model.graph):
        if node.domain != CONTRIB:
            continue
        fused = FusedNode(model.graph, node)
        try:
            if node.op_type not in _EXPANSIONS:
                raise CannotExpand("edgeq does not know how to write it in standard operators")
            outputs = _EXPANSIONS[node.op_type](fused)
            for position, output in enumerate(node.outputs):
                if position in outputs:
                    replace_uses(output, outputs[position])
                elif output.uses() or output.is_graph_output():
                    raise CannotExpand(f"its output {position} is read")
        except CannotExpand as reason:
            problems.append(f"  - {fused.name}: {node.op_type}: {reason}")
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


def _skip_layer_normalization(fused: FusedNode) -> dict[int, ir.Value]:
    total = _skip_sum(fused, bias_at=4)
    beta = fused.input(3) or fused.put("beta", np.zeros_like(fused.array(2)))
    attributes = {"axis": -1, "epsilon": fused.attribute("epsilon", 1e-12)}
    return {0: fused.add("LayerNormalization", [total, fused.needed(2), beta], "norm", **attributes), 3: total}


def _skip_sum(fused: FusedNode, bias_at: int) -> ir.Value:
    x, bias = fused.needed(0), fused.input(bias_at)
    x = x if bias is None else fused.add("Add", [x, bias], "biased")  # first: it is a MatMul's bias
    return fused.add("Add", [x, fused.needed(1)], "sum")


def _root_mean_square(fused: FusedNode, x: ir.Value, gain: ir.Value) -> ir.Value:
    square = fused.add("Mul", [x, x], "square")
    mean = fused.add("ReduceMean", [square, fused.ints("last", -1)], "mean", keepdims=1)
    epsilon = fused.put("epsilon", np.array(fused.attribute("epsilon", 1e-5), np.float32))
    root = fused.add("Sqrt", [fused.add("Add", [mean, epsilon], "mean_and_epsilon")], "root")
    return fused.add("Mul", [fused.add("Div", [x, root], "unit"), gain], "norm")


def _simplified(fused: FusedNode) -> dict[int, ir.Value]:
    if fused.attribute("axis", -1) != -1:
        raise CannotExpand("it normalises another axis than the last")
    return {0: _root_mean_square(fused, fused.needed(0), fused.needed(1))}


def _skip_simplified(fused: FusedNode) -> dict[int, ir.Value]:
    total = _skip_sum(fused, bias_at=3)
    return {0: _root_mean_square(fused, total, fused.needed(2)), 3: total}


def _embed_layer_normalization(fused: FusedNode) -> dict[int, ir.Value]:
    ids = fused.add("Cast", [fused.needed(0)], "ids", to=int(ir.DataType.INT64))
    total = fused.add("Gather", [fused.needed(2), ids], "words")
    if fused.input(8) is not None:
        positions = fused.add("Cast", [fused.needed(8)], "position_ids", to=int(ir.DataType.INT64))
        rows = fused.add("Gather", [fused.needed(3), positions], "positions")
    else:
        table = fused.put("position_rows", fused.array(3)[None])
        length = fused.add("Shape", [ids], "length", start=1, end=2)
        rows = fused.add("Slice", [table, fused.ints("start", 0), length, fused.ints("axis", 1)], "positions")
    total = fused.add("Add", [total, rows], "words_and_positions")
    if fused.input(1) is not None:
        segments = fused.add("Cast", [fused.needed(1)], "segment_ids", to=int(ir.DataType.INT64))
        total = fused.add("Add", [total, fused.add("Gather", [fused.needed(4), segments], "segments")], "sum")
    attributes = {"axis": -1, "epsilon": fused.attribute("epsilon", 1e-12)}
    norm = fused.add("LayerNormalization", [total, fused.needed(5), fused.needed(6)], "norm", **attributes)
    mask = fused.input(7)
    # Output 1 is the lengths of the texts; Attention takes a whole mask as well.
    return {0: norm, 2: total} | ({1: mask} if mask is not None else {})


def _gelu(kind: str, has_bias: bool) -> _Expansion:
    def expansion(fused: FusedNode) -> dict[int, ir.Value]:
        x, bias = fused.needed(0), fused.input(1) if has_bias else None
        x = x if bias is None else fused.add("Add", [x, bias], "biased")
        return {0: fused.add("Gelu", [x], "gelu", **({"approximate": kind} if kind != "none" else {}))}

    return expansion


def _quick_gelu(fused: FusedNode) -> dict[int, ir.Value]:
    alpha = fused.put("alpha", np.array(fused.attribute("alpha", 1.702), np.float32))
    gate = fused.add("Sigmoid", [fused.add("Mul", [fused.needed(0), alpha], "scaled")], "gate")
    return {0: fused.add("Mul", [fused.needed(0), gate], "gated")}


def _fused_matmul(fused: FusedNode) -> dict[int, ir.Value]:
    if fused.attribute("transBatchA", 0) or fused.attribute("transBatchB", 0):
        raise CannotExpand("it transposes batches")
    sides = [_turned(fused, 0, "transA"), _turned(fused, 1, "transB")]
    product = fused.add("MatMul", sides, "product")
    alpha = fused.attribute("alpha", 1.0)
    if alpha != 1.0:
        product = fused.add("Mul", [product, fused.put("alpha", np.array(alpha, np.float32))], "scaled")
    return {0: product}


def _turned(fused: FusedNode, position: int, flag: str) -> ir.Value:
    value = fused.needed(position)
    if not fused.attribute(flag, 0):
        return value
    array = constant(value)
    if array is not None:
        return fused.put(f"{flag}_weight", np.swapaxes(array, -1, -2))
    producer, shape = made_by(value, "Transpose"), dims(value)
    rank = len(shape) if shape is not None else len(producer.attributes["perm"].as_ints()) if producer else 0
    if rank < 2:
        raise CannotExpand(f"{flag} of a value whose rank is not known")
    order = [*range(rank - 2), rank - 1, rank - 2]
    return fused.add("Transpose", [value], flag, perm=order)


def _fused_gemm(fused: FusedNode) -> dict[int, ir.Value]:
    activation = fused.attribute("activation", "")
    if activation not in ("Relu", "Tanh", "Sigmoid"):
        raise CannotExpand(f"its activation is {activation!r}")
    kept = {key: fused.attribute(key, default) for key, default in (("alpha", 1.0), ("beta", 1.0))}
    turns = {key: fused.attribute(key, 0) for key in ("transA", "transB")}
    inputs = [value for value in fused.node.inputs if value is not None]
    return {0: fused.add(activation, [fused.add("Gemm", inputs, "gemm", **kept, **turns)], "activated")}


_EXPANSIONS: dict[str, _Expansion] = {
    "Attention": attention,
    "BiasGelu": _gelu("none", has_bias=True),
    "EmbedLayerNormalization": _embed_layer_normalization,
    "FastGelu": _gelu("tanh", has_bias=True),
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu("none", has_bias=False),
    "MultiHeadAttention": multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _simplified,
    "SkipLayerNormalization": _skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "TransposeMatMul": _fused_matmul,
}
