"""Find the attention mask in whatever arithmetic an exporter wrote it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.data.tokens import Feeds
from edgeq.errors import ConfigError
from edgeq.graph.attention_mask import MASK_SIZE, is_mask
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, is_read_once, readers, replace_uses, scalar
from edgeq.graph.evaluate import outputs_of
from edgeq.graph.roles import Role
from edgeq.passes.finite_mask import START_SIZE

_MASK, _BIAS = "attention_mask", "attention_bias"
_SHUTS = -1e3  # what is added at least to a score that must not count
_MASKS = ([[1, 1, 1]], [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


def recover_padding_mask(model: ir.Model) -> Rewrites:
    """Replace what shuts padding out of the attention by `(attention_mask - 1) * size`, whatever computes it.

    Before::

        attention_mask ─ any arithmetic, shapes, Expand ─ Add(scores) ─ Softmax
        attention_mask ─ any arithmetic, shapes, Expand ─ Where(·, -3.4e38, scores) ─ Softmax

    After::

        attention_mask ─ Cast(float) ─ Unsqueeze[1, 2] ─ Sub 1 ─ Mul size ─ Add(scores) ─ Softmax

    What is computed is decided by computing it: for a few masks it must be 0 (or false) at every key that counts and
    far below 0 (or true) at every other, for all queries alike.
    """
    graph = model.graph
    mask = next((value for value in graph.inputs if value.name == _MASK), None)
    if mask is None:
        return Rewrites(0)
    count, near, judged = 0, [], dict[ir.Value, str]()
    for node in list(graph):
        shut = _shut(node)
        if shut is None:
            continue
        value, scores = shut
        if value not in judged:
            judged[value] = _fault(model, value, node)
        if judged[value]:
            near.append(f"{node.name}: {judged[value]}")
            continue
        replace_uses(node.outputs[0], add_node(node, "Add", [scores, _bias(graph, mask)], f"{node.name}/masked"))
        count += 1
    return Rewrites(count, tuple(near))


def _shut(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Give what shuts scores out, and the scores, where the node's result goes into a softmax."""
    if node.op_type not in ("Add", "Where") or not _leads_to_softmax(node.outputs[0]):
        return None
    if node.op_type == "Add":
        first, second = node.inputs
        for value, scores in ((first, second), (second, first)):
            if value is None or scores is None or constant(scores) is not None:
                continue
            if _is_of_mask(value) and not is_mask(value):
                return value, scores
        return None
    condition, yes, no = node.inputs
    if condition is None or not _is_of_mask(condition):
        return None
    for fill, scores in ((yes, no), (no, yes)):
        number = scalar(fill)
        if number is not None and number <= _SHUTS and scores is not None:
            return condition, scores
    return None


def _leads_to_softmax(value: ir.Value) -> bool:
    while is_read_once(value):
        node = readers(value)[0]
        if node.op_type == "Softmax":
            return True
        if node.op_type not in ("Add", "Cast", "Identity", "Max"):
            return False
        value = node.outputs[0]
    return False


def _is_of_mask(value: ir.Value) -> bool:
    """Tell whether a value depends on the mask, and on other inputs by their shapes alone."""
    found: set[str] = set()
    seen: set[ir.Value] = set()
    todo: list[ir.Value | None] = [value]
    while todo:
        item = todo.pop()
        if item is None or item in seen:
            continue
        seen.add(item)
        if item.is_graph_input():
            found.add(str(item.name))
        node = item.producer()
        if node is not None and node.op_type not in ("Shape", "Size"):
            todo.extend(node.inputs)
    return found == {_MASK}


def _fault(model: ir.Model, value: ir.Value, node: ir.Node) -> str:
    """Say what keeps a value from being a mask of padding alone, or nothing."""
    session = outputs_of(model, [value])
    is_choice = node.op_type == "Where"
    fills_yes = is_choice and (number := scalar(node.inputs[1])) is not None and number <= _SHUTS
    for rows in _MASKS:
        mask = np.array(rows, np.int64)
        try:
            (found,) = session.run(None, Feeds(np.zeros_like(mask), mask))
        except ConfigError as error:
            return f"what masks its scores cannot be computed alone: {error}"
        if found.ndim != 4 or found.shape[3] != mask.shape[1] or found.shape[0] not in (1, len(mask)):
            return f"what masks its scores has the shape {found.shape}, not [batch, 1, 1 or queries, keys]"
        shuts = _shuts(found, is_choice, fills_yes)
        if shuts is None or not bool(np.all(shuts == (mask == 0)[:, None, None, :])):
            return "what masks its scores is not the padding alone: it depends on positions too, or is not 0 elsewhere"
    return ""


def _shuts(found: NDArray[np.generic], is_choice: bool, fills_yes: bool) -> NDArray[np.bool_] | None:
    """Tell at which keys scores are shut out; None where something else is added to them."""
    if is_choice:
        return np.asarray(found.astype(bool) == fills_yes)
    numbers = found.astype(np.float64)
    shuts: NDArray[np.bool_] = numbers <= _SHUTS
    return shuts if bool(np.all(shuts | (numbers == 0))) else None


def _bias(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """Give the one mask of the graph, written where nothing stands before it."""
    known = next((node.outputs[0] for node in graph if node.name == _BIAS), None)
    if known is not None:
        return known
    first = next(iter(graph))
    size = add_constant(graph, MASK_SIZE, np.array(START_SIZE, np.float32))
    one = add_constant(graph, "one", np.array(1.0, np.float32))
    axes = add_constant(graph, "mask_axes", np.array([1, 2], np.int64))
    whole = add_node(first, "Cast", [mask], f"{_BIAS}/mask", {"to": int(ir.DataType.FLOAT)})
    row = add_node(first, "Unsqueeze", [whole, axes], f"{_BIAS}/unsqueezed")
    shifted = add_node(first, "Sub", [row, one], f"{_BIAS}/shifted")
    return add_node(first, "Mul", [shifted, size], _BIAS, role=Role.ATTENTION_MASK)
