"""Find LayerNormalization in its decomposed forms."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, made_by, readers, replace_uses, scalar


def recover_layer_normalization(model: ir.Model) -> Rewrites:
    """Replace mean, variance, division, weight and bias by one `LayerNormalization`.

    Before::

        x ─┬─ ReduceMean(-1) ─┐
           └──────────────── Sub ─┬─ Pow(2) or Mul ─ ReduceMean(-1) ─ Add(eps) ─ Sqrt ─┐
                                  └────────────────────────────────────────────────── Div ─ Mul(w) ─ Add(b)

    After::

        x ─ LayerNormalization(w, b, axis -1, eps)

    Instead of the Div there may be a product with the root's Reciprocal; weight and bias may be missing.
    """
    count, near = 0, []
    for node in list(model.graph):
        parts = _parts(node)
        if parts is None:
            continue
        root, centred = parts
        x, found = centred.inputs[0], _epsilon(root, centred)
        if isinstance(found, str) or x is None:
            near.append(f"{node.name}: a division by a root, but not the rest of a layer normalisation: {found}")
            continue
        end, weight, bias = _weight_and_bias(model.graph, node, x)
        if weight is None or bias is None:
            near.append(f"{node.name}: a layer normalisation without weight, of a width that is not known")
            continue
        attributes = {"axis": -1, "epsilon": found}
        replace_uses(
            end.outputs[0], add_node(end, "LayerNormalization", [x, weight, bias], f"{end.name}/norm", attributes)
        )
        count += 1
    return Rewrites(count, tuple(near))


def _parts(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Give the root and what is divided by it, where a node divides a difference by a root."""
    if node.op_type == "Div":
        root, centred = made_by(node.inputs[1], "Sqrt"), made_by(node.inputs[0], "Sub")
        return (root, centred) if root is not None and centred is not None else None
    if node.op_type != "Mul":
        return None
    for first, second in (node.inputs, reversed(node.inputs)):
        inverse, centred = made_by(second, "Reciprocal"), made_by(first, "Sub")
        root = made_by(inverse.inputs[0], "Sqrt") if inverse is not None else None
        if root is not None and centred is not None:
            return root, centred
    return None


def _epsilon(root: ir.Node, centred: ir.Node) -> float | str:
    """Give epsilon when the root is that of the mean square of `centred` plus epsilon, on the last axis, or why not."""
    add = made_by(root.inputs[0], "Add")
    if add is None:
        return "nothing is added under the root"
    at = next((at for at, value in enumerate(add.inputs) if scalar(value) is not None), None)
    epsilon = scalar(add.inputs[at]) if at is not None else None
    if at is None or epsilon is None:
        return "what is added under the root is no single number"
    mean = made_by(add.inputs[1 - at], "ReduceMean")
    square = made_by(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    if mean is None or square is None:
        return "under the root stands no mean of squares"
    d = centred.outputs[0]
    if square.inputs[0] is not d or not (square.inputs[1] is d or scalar(square.inputs[1]) == 2.0):
        return "the mean is not of the squares of what is divided"
    first = made_by(centred.inputs[1], "ReduceMean")
    if first is None or first.inputs[0] is not centred.inputs[0]:
        return "what is divided is not centred by its own mean"
    if not _is_last_axis(mean) or not _is_last_axis(first):
        return "a mean is not over the last axis alone, kept"
    return epsilon


def _is_last_axis(node: ir.Node) -> bool:
    if "keepdims" in node.attributes and node.attributes["keepdims"].as_int() != 1:
        return False
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    else:
        array = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [] if array is None else array.reshape(-1).tolist()
    shape = dims(node.inputs[0])
    return axes == [-1] or (shape is not None and axes == [len(shape) - 1])


def _weight_and_bias(
    graph: ir.Graph, division: ir.Node, x: ir.Value
) -> tuple[ir.Node, ir.Value | None, ir.Value | None]:
    """Follow the division through Mul(weight) and Add(bias); where one is missing, it is all ones or zeros."""
    node = division
    found: dict[str, ir.Value] = {}
    for op_type in ("Mul", "Add"):
        after = readers(node.outputs[0])
        reader = after[0] if len(after) == 1 and after[0].op_type == op_type else None
        factor = next((value for value in reader.inputs if _is_row(value)), None) if reader is not None else None
        if reader is not None and factor is not None:
            node, found[op_type] = reader, factor
    width = next((len(row) for value in found.values() if (row := constant(value)) is not None), None)
    width = width or next((size for size in (dims(x) or [])[-1:] if isinstance(size, int)), None)
    if width is None:
        return node, None, None
    weight = found.get("Mul") or add_constant(graph, f"{division.name}/ones", np.ones(width, np.float32))
    bias = found.get("Add") or add_constant(graph, f"{division.name}/zeros", np.zeros(width, np.float32))
    return node, weight, bias


def _is_row(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.ndim == 1 and array.size > 1
