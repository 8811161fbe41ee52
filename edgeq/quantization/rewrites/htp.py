"""Rewrite an equalised float model into the operators that Hexagon's tensor unit has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph import roles
from edgeq.graph.edit import add_node, checked, constant, dims, made_by, readers, replace_uses, required
from edgeq.passes.matmul_to_gemm import flat_tokens
from edgeq.quantization.rewrites.decompose_norms import NORMALIZED, first_token
from edgeq.quantization.rewrites.fold_norm_bias import even_values, widen_outputs
from edgeq.quantization.rewrites.join_positions import join_positions
from edgeq.quantization.rewrites.token_pooling import last_token
from edgeq.records import HtpForm


def htp_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], form: HtpForm
) -> tuple[ir.Model, Observed, frozenset[str]]:
    """Rewrite a model, exactly in FP32: constants folded, tokens a flat list, weight products Gemm.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its primitives.
        form: whether products have 8 bits.

    Returns:
        A float model with `sentence_embedding` as its one output, the statistics of its tensors, and the names of the
        products that have one row a text.
    """
    seen: Observed = dict(observed)
    graph_model = ir.from_proto(checked(ir.from_proto(model)))  # with the shapes of what equalising added
    graph = graph_model.graph
    while len(graph.outputs) > 1:
        graph.outputs.pop()  # `del outputs[1:]` leaves them marked as outputs
    for node in list(graph):
        if node.op_type == "GatherElements" and not first_token(graph, node):
            last_token(graph, node)
    join_positions(graph)
    even_values(graph, seen)
    if form.gemm_bits == 8:
        widen_outputs(graph, seen, form.widen_quantile)
    _observe_norms(graph, seen)
    _unit_lengths(graph)
    _turn_poolings(graph, seen)
    rows = _row_products(graph)
    RemoveUnusedNodesPass()(graph_model)
    TopologicalSortPass()(graph_model)
    flat_tokens(graph_model, take_summands=False)
    for value in (value for node in graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None  # many have lost an axis
    return graph_model, seen, rows


def _observe_norms(graph: ir.Graph, observed: Observed) -> None:
    """Give every LayerNorm's output the statistics that follow from those of its normalised tensor."""
    for node in graph:
        name = str(node.outputs[0].name)
        if node.op_type != "LayerNormalization" or name in observed or f"{name}{NORMALIZED}" not in observed:
            continue
        inner, gain = observed[f"{name}{NORMALIZED}"], constant(node.inputs[1])
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.float32)
        if gain is None or bias is None:
            continue
        ends = [end * gain * np.sqrt(gain.shape[-1]) + bias for end in (inner.minimum, inner.maximum)]
        observed[name] = Statistics(np.minimum(*ends).astype(np.float32), np.maximum(*ends).astype(np.float32))


def _unit_lengths(graph: ir.Graph) -> None:
    """Make one operator of a division by the length.

    Before::

        x ─┬─ ReduceL2 ─ Clip ─┬─ Div
           └───────────────────┘

    After::

        x ─ LpNormalization
    """
    for node in list(graph):
        clipped = made_by(node.inputs[1], "Clip", "Max", "ReduceL2") if node.op_type == "Div" else None
        while clipped is not None and clipped.op_type != "ReduceL2":
            clipped = made_by(clipped.inputs[0], "ReduceL2")
        if clipped is None or clipped.inputs[0] is not node.inputs[0] or node.inputs[0] is None:
            continue
        attributes = {"axis": -1, "p": 2}
        result = add_node(node, "LpNormalization", [node.inputs[0]], f"{node.name}/unit_length", attributes)
        result.dtype, result.shape = ir.DataType.FLOAT, node.outputs[0].shape
        replace_uses(node.outputs[0], result)
        graph.remove(node, safe=True)


def _row_products(graph: ir.Graph) -> frozenset[str]:
    """Let each product of one row a text (Dense) be a Gemm, as `flat_tokens` does with those of tokens.

    Returns:
        Their names.
    """
    names = set()
    for node in list(graph):
        shape = dims(node.inputs[0]) if node.op_type == "MatMul" else None
        if shape is None or len(shape) != 2 or constant(node.inputs[1]) is None:
            continue
        following = readers(node.outputs[0])
        add = following[0] if len(following) == 1 and following[0].op_type == "Add" else None
        bias = next((v for v in add.inputs if v is not None and constant(v) is not None), None) if add else None
        end = add if add is not None and bias is not None else node
        inputs = [*node.inputs, bias] if bias is not None else list(node.inputs)
        result = add_node(node, "Gemm", inputs, str(node.name))  # type: ignore[arg-type]
        roles.hand_over(node, required(result.producer()))
        result.name = f"{end.outputs[0].name}/gemm"
        result.dtype, result.shape = ir.DataType.FLOAT, end.outputs[0].shape
        replace_uses(end.outputs[0], result)
        for old in dict.fromkeys((end, node)):
            graph.remove(old, safe=True)
        names.add(str(node.name))
    return frozenset(names)


def _turn_poolings(graph: ir.Graph, observed: Observed) -> None:
    """Put the shares of a pooling on the right.

    Before::

        shares[batch, 1, tokens], x[batch, tokens, channels] ─ MatMul

    After::

        xᵀ, sharesᵀ ─ MatMul ─ Transpose

    The unit reads the right operand of a product in 8 bits even where it has 16. All tokens of a text have one share,
    so that rounding it does not turn the vector.
    """
    of_mask = {value for value in graph.inputs if value.name == "attention_mask"}
    for node in list(graph):
        variable = [value for value in node.inputs if value is not None and constant(value) is None]
        if variable and all(value in of_mask for value in variable):
            of_mask.update(node.outputs)
        if node.op_type != "MatMul" or node.inputs[0] not in of_mask or node.inputs[1] is None:
            continue
        turned = [
            _turned(node, value, f"{node.name}/{name}")
            for name, value in (("x", node.inputs[1]), ("shares", node.inputs[0]))
            if value is not None
        ]
        product = add_node(node, "MatMul", turned, f"{node.name}/turned")
        observed[str(product.name)] = observed[str(node.outputs[0].name)]
        back = _turned(node, product, f"{node.name}/back")
        back.dtype, back.shape = ir.DataType.FLOAT, node.outputs[0].shape
        replace_uses(node.outputs[0], back)
        graph.remove(node, safe=True)


def _turned(before: ir.Node, value: ir.Value, name: str) -> ir.Value:
    return add_node(before, "Transpose", [value], name, {"perm": [0, 2, 1]})
