"""Say of each operator of a float model whether HTP's form takes it, before anything is calibrated."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.backends.contract import OperatorVerdict
from edgeq.graph.dataflow import shape_values
from edgeq.graph.edit import constant, made_by, readers
from edgeq.quantization.htp.quantizer import HTP_QUANTIZERS
from edgeq.quantization.htp.unsupported import known_part

_UNIT_LENGTH = ("ReduceL2", "Clip", "Max")  # what stands between a vector and its division by its length
_BY_PLACE = "GatherElements"  # the first token is sliced off, the last picked by a product


def verdicts(model: ir.Model) -> tuple[OperatorVerdict, ...]:
    """Give one verdict for each node, in graph order."""
    sizes = shape_values(model.graph)
    of_mask = {item for item in model.graph.inputs if item.name == "attention_mask"} | sizes
    found = []
    for node in model.graph:
        variable = [value for value in node.inputs if value is not None and constant(value) is None]
        if variable and all(value in of_mask for value in variable):
            of_mask.update(node.outputs)
        verdict, why = _verdict(node, of_mask)
        name = str(node.name or node.outputs[0].name)
        found.append(OperatorVerdict(name, node.op_type, verdict, why, ()))  # type: ignore[arg-type]
    return tuple(found)


def _verdict(node: ir.Node, of_mask: set[ir.Value]) -> tuple[str, str]:
    """Give a verdict and its sentence."""
    kind, part = node.op_type, known_part(node)
    if node.outputs[0] in of_mask:
        return "supported", "is looked up by the mask, or constant in each length"
    if kind == _BY_PLACE or (part and all(use.op_type == _BY_PLACE for use in readers(node.outputs[0]))):
        return "unknown", "its place in the pooling decides, which quantising finds"
    if part:
        return "refused", part
    if _is_of_unit_length(node):
        return "supported", "becomes a part of LpNormalization"
    if kind in HTP_QUANTIZERS:
        return "supported", "becomes Gemm" if _is_weight_product(node) else "keeps its form, with codes"
    return "refused", f"{kind} has no form for HTP"


def _is_weight_product(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and constant(node.inputs[1]) is not None


def _is_of_unit_length(node: ir.Node) -> bool:
    """Tell whether a node is of a division by the vector's own length."""
    if node.op_type in _UNIT_LENGTH:
        return any(_is_of_unit_length(reader) for reader in readers(node.outputs[0]))
    if node.op_type != "Div":
        return False
    length = made_by(node.inputs[1], *_UNIT_LENGTH)
    while length is not None and length.op_type != "ReduceL2":
        length = made_by(length.inputs[0], *_UNIT_LENGTH)
    return length is not None and length.inputs[0] is node.inputs[0]
