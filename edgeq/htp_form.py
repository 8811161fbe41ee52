"""Rewrite an equalised float model into the operators that Hexagon's tensor unit has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.folding import Observed
from edgeq.observe import Statistics
from edgeq.passes.graph import add_node, constant, dims, made_by, readers, replace_uses
from edgeq.primitives import NORMALIZED


def observe_norms(graph: ir.Graph, observed: Observed) -> None:
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


def unit_lengths(graph: ir.Graph) -> None:
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


def row_products(graph: ir.Graph) -> frozenset[str]:
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
        result.name = f"{end.outputs[0].name}/gemm"
        result.dtype, result.shape = ir.DataType.FLOAT, end.outputs[0].shape
        replace_uses(end.outputs[0], result)
        for old in dict.fromkeys((end, node)):
            graph.remove(old, safe=True)
        names.add(str(node.name))
    return frozenset(names)
