"""Say, before anything is calibrated, what each operator of a float model becomes in a .tflite file."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from edgeq.backends.contract import OperatorVerdict
from edgeq.graph.edit import constant, made_by
from edgeq.records import IntegerSpec

Written = tuple[str, str]  # operator, dtype of its result
Reason = Callable[[str, str], str | None]

# What becomes one operator, by the part of the model that its bits follow.
_GEMM = {"Gelu": "GELU", "Relu": "RELU"}
_ATTENTION = {"Softmax": "SOFTMAX"}
_WIDE = {"Add": "ADD", "Mul": "MUL", "Sub": "SUB", "Tanh": "TANH"}
_MOVES = {"Reshape": "RESHAPE", "Squeeze": "RESHAPE", "Transpose": "TRANSPOSE", "Unsqueeze": "RESHAPE"}
# Taken apart, or read with the operator behind it.
_PARTS = frozenset({"Div", "Expand", "Identity", "Shape"})
_BY_PLACE = frozenset({"ArgMax", "Concat", "GatherElements", "Slice"})


def verdicts(model: ir.Model, form: IntegerSpec, host: Reason, refusal: Reason) -> tuple[OperatorVerdict, ...]:
    """Judge every node of a float model.

    Args:
        model: in the dialect.
        form: of the scheme.
        host: says why an operator of a dtype stays on the host, or None.
        refusal: says why a runtime has no kernel for it, or None.

    Returns:
        One verdict for each node, in graph order.
    """
    of_mask = {value for value in model.graph.inputs if value.name == "attention_mask"}
    found = []
    for node in model.graph:
        variable = [value for value in node.inputs if value is not None and constant(value) is None]
        is_lookup = node.op_type == "Gather" and any(value.name == "input_ids" for value in variable)
        if node.op_type == "Shape" or (variable and all(value in of_mask for value in variable) and not is_lookup):
            of_mask.update(node.outputs)
        found.append(_verdict(node, of_mask, is_lookup, form, host, refusal))
    return tuple(found)


def _verdict(
    node: ir.Node, of_mask: set[ir.Value], is_lookup: bool, form: IntegerSpec, host: Reason, refusal: Reason
) -> OperatorVerdict:
    name, kind = str(node.name or node.outputs[0].name), node.op_type
    if node.outputs[0] in of_mask:
        written: tuple[Written, ...] | None = (("CAST", "int8"),) if kind == "Cast" else ()
        if kind == "Cast" and _has_cast_before(node, of_mask):
            written = ()  # the mask is cast once
    elif kind == "MatMul" and node.inputs[0] in of_mask:  # pooling
        wide = ("BATCH_MATMUL", "int16")
        written = (wide,) if form.has_16bit_matmul else (("MUL", "int16"), ("FULLY_CONNECTED", "int16"))
    elif kind in ("Clip", "Max") and made_by(node.inputs[0], "ReduceL2") is not None:  # of the unit length
        written = ()
    else:
        written = _written(node, is_lookup, form)
    if written is None:
        return OperatorVerdict(name, kind, "refused", f"{kind} has no integer form", ())
    for operator in written:
        why = refusal(*operator)
        if why is not None:
            return OperatorVerdict(name, kind, "refused", why, ())
    left = [(operator, why) for operator in written if (why := host(*operator)) is not None]
    if left:
        return OperatorVerdict(name, kind, "on-host", left[0][1], tuple(operator[0] for operator, _ in left))
    if kind in _BY_PLACE and node.outputs[0] not in of_mask:
        return OperatorVerdict(name, kind, "unknown", "its place in the pooling decides, which quantising finds", ())
    names = ", ".join(dict.fromkeys(operator for operator, _ in written))
    return OperatorVerdict(name, kind, "supported", f"becomes {names}" if names else "is prepared, not computed", ())


def _has_cast_before(node: ir.Node, of_mask: set[ir.Value]) -> bool:
    graph = node.graph
    if graph is None:
        return False
    for other in graph:
        if other is node:
            return False
        if other.op_type == "Cast" and other.outputs[0] in of_mask:
            return True
    return False


def _written(node: ir.Node, is_lookup: bool, form: IntegerSpec) -> tuple[Written, ...] | None:
    """Give the TFLite operators that a node becomes, or None where there are none."""
    kind, gemm, attention = node.op_type, f"int{form.gemm_bits}", f"int{form.attention_bits}"
    root = ("GATHER", "int16") if form.has_16bit_tables else ("RSQRT", "int16")
    squares = ("BATCH_MATMUL", "int16") if form.has_16bit_matmul else ("MUL", "int16")
    exact: tuple[Written, ...] = (("MUL", "int32"), ("RIGHT_SHIFT", "int32")) if form.sum_bits == 32 else ()
    if is_lookup:
        return (("GATHER", "int8"),)
    if kind == "MatMul":
        return (("FULLY_CONNECTED", gemm),) if constant(node.inputs[1]) is not None else (("BATCH_MATMUL", attention),)
    if kind == "LayerNormalization":
        return (("FULLY_CONNECTED", "int16"), ("SUB", "int16"), squares, root, ("MUL", "int16"), *exact)
    if kind == "ReduceL2":
        return (squares, root)
    for table, dtype in ((_GEMM, gemm), (_ATTENTION, attention), (_WIDE, "int16"), (_MOVES, "int8")):
        if kind in table:
            return ((table[kind], dtype),)
    return () if kind in _PARTS | _BY_PLACE else None
