"""Find the attention mask in whatever arithmetic an exporter wrote it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.data.tokens import Feeds
from edgeq.errors import ConfigError
from edgeq.graph.attention_mask import MASK_SIZE, is_of_padding_alone
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, replace_uses, scalar
from edgeq.graph.evaluate import outputs_of
from edgeq.graph.roles import Role
from edgeq.passes.finite_mask import START_SIZE
from edgeq.passes.mask_last import terms
from edgeq.passes.open_copy import shuts_by_constants

_MASK, _BIAS = "attention_mask", "attention_bias"
SHUTS = -1e3  # what is added at least to a score that must not count
_SUMS = ("Add", "Cast", "Identity", "Max")
MASKS = ([[1, 1, 1]], [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


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
    count, near, judged = 0, [], dict[tuple[ir.Value, str], str]()
    for node in list(graph):
        reasons = []
        for shut in shut_out(node):
            key = shut.value, shut.kind
            if key not in judged:
                judged[key] = _fault(model, shut)
            reasons.append(judged[key])
            if not judged[key]:
                bias = padding_mask(graph, mask)
                replace_uses(node.outputs[0], add_node(node, "Add", [shut.scores, bias], f"{node.name}/masked"))
                count += 1
                break
        near += [f"{node.name}: {reasons[0]}"] if all(reasons) and reasons else []
    return Rewrites(count, tuple(near))


class Shut(NamedTuple):
    """Name what shuts scores out of a softmax, and how: it is added, subtracted, or the condition of a Where."""

    value: ir.Value
    scores: ir.Value
    kind: str  # "Add", "Sub", "where true" or "where false": there the Where fills its scores

    def keys_out(self, found: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Tell at which keys a computed value shuts scores out."""
        if self.kind.startswith("where"):
            return np.asarray(found.astype(bool) == (self.kind == "where true"))
        return np.asarray(self.added(found) <= SHUTS)

    def added(self, found: NDArray[np.generic]) -> NDArray[np.float64]:
        """Give what is added to the scores."""
        return found.astype(np.float64) * (-1.0 if self.kind == "Sub" else 1.0)


def shut_out(node: ir.Node) -> list[Shut]:
    """List what may shut scores out in a node whose result goes into softmaxes alone, however many."""
    if node.op_type not in ("Add", "Sub", "Where") or not softmaxes_behind(node.outputs[0]):
        return []
    if node.op_type == "Where":
        condition, yes, no = node.inputs
        if condition is None or not is_of_mask(condition):
            return []
        sides = ((yes, no, "where true"), (no, yes, "where false"))
        return [
            Shut(condition, scores, kind)
            for fill, scores, kind in sides
            if scores is not None and (number := scalar(fill)) is not None and number <= SHUTS
        ]
    first, second = node.inputs
    pairs = ((second, first),) if node.op_type == "Sub" else ((first, second), (second, first))
    return [
        Shut(value, scores, node.op_type)
        for value, scores in pairs
        if value is not None and scores is not None and constant(scores) is None
        if is_of_mask(value) and not _is_bias_with_mask(value)
    ]


def _is_bias_with_mask(value: ir.Value) -> bool:
    """Tell whether a value is a finite mask, or the sum of one and a bias by positions: `mask_last` takes it apart."""
    values, masks = terms(value)
    return bool(masks) and not any(is_of_mask(each) or shuts_by_constants(each) for each in values)


def softmaxes_behind(value: ir.Value) -> list[ir.Node]:
    """List the softmaxes that a value is a summand of; none where anything else reads it."""
    found: dict[ir.Node, None] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        uses = each.uses()
        if not uses or each.is_graph_output():
            return []
        for use in uses:
            if use.node.op_type == "Softmax":
                found[use.node] = None
            elif use.node.op_type in _SUMS or (use.node.op_type, use.idx) == ("Sub", 0):
                waiting.append(use.node.outputs[0])
            else:
                return []
    return list(found)


def is_of_mask(value: ir.Value) -> bool:
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


def _fault(model: ir.Model, shut: Shut) -> str:
    """Say what keeps a value from being a mask of padding alone, or nothing."""
    session = outputs_of(model, [shut.value])
    for rows in MASKS:
        mask = np.array(rows, np.int64)
        try:
            (found,) = session.run(None, Feeds(np.zeros_like(mask), mask))
        except ConfigError as error:
            return f"what masks its scores cannot be computed alone: {error}"
        if found.ndim != 4 or found.shape[3] != mask.shape[1] or found.shape[0] not in (1, len(mask)):
            return f"what masks its scores has the shape {found.shape}, not [batch, 1, 1 or queries, keys]"
        shuts = _shuts(found, shut)
        if shuts is None or not bool(np.all(shuts == (mask == 0)[:, None, None, :])):
            return "what masks its scores is not the padding alone: it depends on positions too, or is not 0 elsewhere"
    return ""


def _shuts(found: NDArray[np.generic], shut: Shut) -> NDArray[np.bool_] | None:
    """Tell at which keys scores are shut out; None where something else is added to them."""
    shuts = shut.keys_out(found)
    is_nothing_else = shut.kind.startswith("where") or bool(np.all(shuts | (shut.added(found) == 0)))
    return shuts if is_nothing_else else None


def padding_mask(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """Give the one mask of the graph, written where nothing stands before it."""
    names = {node.name: node for node in graph}
    known = next((node for node in names.values() if is_of_padding_alone(node.outputs[0])), None)
    if known is not None:
        return known.outputs[0]
    first, name = next(iter(graph)), f"{_BIAS}_of_padding" if _BIAS in names else _BIAS
    stored = graph.initializers.get(MASK_SIZE)
    size = stored if stored is not None else add_constant(graph, MASK_SIZE, np.array(START_SIZE, np.float32))
    one = add_constant(graph, "one", np.array(1.0, np.float32))
    axes = add_constant(graph, "mask_axes", np.array([1, 2], np.int64))
    whole = add_node(first, "Cast", [mask], f"{name}/mask", {"to": int(ir.DataType.FLOAT)})
    row = add_node(first, "Unsqueeze", [whole, axes], f"{name}/unsqueezed")
    shifted = add_node(first, "Sub", [row, one], f"{name}/shifted")
    return add_node(first, "Mul", [shifted, size], name, role=Role.ATTENTION_MASK)
