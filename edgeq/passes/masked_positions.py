"""Take apart what positions add to scores and what padding shuts, where an exporter computes both as one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.data.tokens import Feeds
from edgeq.errors import ConfigError
from edgeq.graph.attention_mask import is_mask
from edgeq.graph.dataflow import MASK, follows_from_sizes
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, replace_uses
from edgeq.graph.evaluate import outputs_of
from edgeq.passes.finite_mask import limited_mask
from edgeq.passes.open_copy import open_copy, shuts_by_constants
from edgeq.passes.recover_padding_mask import MASKS, SHUTS, Shut, is_of_mask, padding_mask, shut_out, softmaxes_behind

_SAME = 1e-6  # of the largest value: what is counted by a mask may be rounded otherwise


class Parts(NamedTuple):
    """Name what is added to scores instead of one value: what positions give, and the mask."""

    bias: ir.Value | None
    mask: ir.Value | None


def masked_positions(model: ir.Model) -> Rewrites:
    """Replace what mask and positions add to scores together by a bias of positions, and the mask behind it.

    Before::

        positions ─────────────────────────────┐
        attention_mask ─ any arithmetic, Where ┴─ Add(scores) ─ Softmax

    After::

        positions ─ Add(scores) ─ Add((attention_mask * allowed - 1) * size) ─ Softmax

    What is computed is decided by computing it: where a token counts it must be what it is without padding, for each
    query that counts, and far below 0 elsewhere. `allowed` stands where positions shut keys out, too (causal or local
    attention). A bias by positions that the mask counts (ALiBi) follows from sizes as well, as long as another mask
    shuts padding out.
    """
    mask = next((value for value in model.graph.inputs if value.name == MASK), None)
    if mask is None:
        return Rewrites(0)
    count, near = 0, []
    written: dict[tuple[ir.Value, str], Parts | str] = {}
    for node in list(model.graph):
        for shut in (*shut_out(node), *_fixed(node)):
            if _is_of_positions(shut.scores):
                continue  # a part of what is added to the scores further on
            key = shut.value, shut.kind
            if key not in written:
                written[key] = _parts(model, mask, node, shut)
            parts = written[key]
            if isinstance(parts, str):
                near += [f"{node.name}: {parts}"] if parts else []
                continue
            _add(node, shut.scores, parts)
            count += 1
            break
    return Rewrites(count, tuple(near))


def _fixed(node: ir.Node) -> list[Shut]:
    """List the summands of scores that follow from sizes alone and may shut keys out: the mask of padding is beside."""
    behind = softmaxes_behind(node.outputs[0]) if node.op_type == "Add" else []
    if not behind or not all(map(_has_mask, behind)):
        return []
    first, second = node.inputs
    return [
        Shut(value, scores, "Add")
        for value, scores in ((first, second), (second, first))
        if value is not None and scores is not None and constant(scores) is None
        if follows_from_sizes(value) and shuts_by_constants(value)
    ]


def _is_of_positions(value: ir.Value) -> bool:
    return is_of_mask(value) or follows_from_sizes(value)


def _add(node: ir.Node, scores: ir.Value, parts: Parts) -> None:
    total = scores
    for name, part in (("placed", parts.bias), ("masked", parts.mask)):
        if part is not None:
            total = add_node(node, "Add", [total, part], f"{node.name}/{name}", like=node.outputs[0])
    replace_uses(node.outputs[0], total)


class Judged(NamedTuple):
    """Say what a value does to scores; `fault` says why it is not made of a mask and of positions."""

    fault: str
    shuts_padding: bool = False
    shuts_positions: bool = False
    is_causal: bool = True  # what positions shut out is each key behind the query
    is_biased: bool = False  # something is added where a query may look


def _parts(model: ir.Model, mask: ir.Value, node: ir.Node, shut: Shut) -> Parts | str:
    """Write what takes the place of a value, or say why nothing can; an empty reason is none."""
    try:
        judged = _judged(model, shut)
    except ConfigError as error:
        judged = Judged(f"what masks its scores cannot be computed alone: {error}")
    if judged.fault or (not judged.shuts_positions and follows_from_sizes(shut.value)):
        return judged.fault  # a bias by positions stays
    if not judged.shuts_padding and not all(map(_has_mask, softmaxes_behind(node.outputs[0]))):
        return "what is added to its scores depends on the mask, but shuts no padding out"
    graph, first = model.graph, next(iter(model.graph))
    needs_copy = judged.is_biased or (judged.shuts_positions and not judged.is_causal)
    copy = open_copy(model, shut.value, mask) if needs_copy else None
    if copy is not None and shut.kind == "Sub":
        copy = add_node(first, "Neg", [copy], f"{node.name}/negated", like=copy)
    if not judged.shuts_positions:
        return Parts(copy, padding_mask(graph, mask) if judged.shuts_padding else None)
    allowed = _causal(graph, mask) if copy is None else _allowed(graph, node, shut, copy)
    limited = limited_mask(graph, first, mask, [allowed])
    if copy is None or not judged.is_biased:
        return Parts(None, limited)
    none = add_constant(graph, f"{node.name}/nothing", np.array(0.0, np.float32))
    return Parts(add_node(first, "Where", [allowed, copy, none], f"{node.name}/bias", like=copy), limited)


def _allowed(graph: ir.Graph, node: ir.Node, shut: Shut, copy: ir.Value) -> ir.Value:
    """Write where positions let a query look."""
    first, name = next(iter(graph)), f"{node.name}/allowed"
    if shut.kind == "where false":
        return copy
    limit = [] if shut.kind == "where true" else [add_constant(graph, f"{node.name}/shut", np.array(SHUTS, np.float32))]
    allowed = add_node(first, "Greater" if limit else "Not", [copy, *limit], name)
    allowed.dtype, allowed.shape = ir.DataType.BOOL, copy.shape
    return allowed


def _causal(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """Write bool[1, 1, queries, keys] that lets each query see the keys up to itself."""
    first = next(iter(graph))
    numbers = {"zero": np.array(0), "one": np.array(1), "rows": np.array([0, 1, 3]), "columns": np.array([0, 1, 2])}
    stored = {name: add_constant(graph, f"causal/{name}", array.astype(np.int64)) for name, array in numbers.items()}
    size = add_node(first, "Shape", [mask], "causal/size", {"start": 1, "end": 2})
    length = add_node(first, "Squeeze", [size], "causal/length")
    places = add_node(first, "Range", [stored["zero"], length, stored["one"]], "causal/places")
    rows, columns = (
        add_node(first, "Unsqueeze", [places, stored[name]], f"causal/places_in_{name}") for name in ("rows", "columns")
    )
    return add_node(first, "LessOrEqual", [columns, rows], "causal/allowed")


def _judged(model: ir.Model, shut: Shut) -> Judged:
    """Compute a value for a few masks; what a query that is padding sees may be anything.

    Raises:
        ConfigError: it cannot be computed.
    """
    session = outputs_of(model, [shut.value])
    lets_in: set[bool] = set()
    shuts_positions, is_causal, is_biased = False, True, False
    for rows in MASKS:
        mask = np.array(rows, np.int64)
        found, opened = (session.run(None, Feeds(np.zeros_like(each), each))[0] for each in (mask, np.ones_like(mask)))
        batch, length = mask.shape
        if (
            found.ndim < 2
            or found.shape[-1] not in (1, length)
            or (found.ndim == 4 and found.shape[0] not in (1, batch))
        ):
            return Judged(f"what masks its scores has the shape {found.shape}, not [batch, heads, 1 or queries, keys]")
        whole = (batch, found.shape[1] if found.ndim == 4 else 1, length, length)
        if found.ndim == 3 or found.shape[-2] not in (1, length):
            return Judged(f"what masks its scores has the shape {found.shape}, not [batch, heads, 1 or queries, keys]")
        out, always = (np.broadcast_to(shut.keys_out(each), whole) for each in (found, opened))
        added, free = (np.broadcast_to(shut.added(each), whole) for each in (found, opened))
        queries = np.broadcast_to(mask[:, None, :, None] > 0, whole) | (found.shape[-2] == 1)
        both = queries & (mask[:, None, None, :] > 0)
        if not np.array_equal(out[both], always[both]) or not _is_same(
            shut, added[both & ~always], free[both & ~always]
        ):
            return Judged("what masks its scores changes them where a token counts")
        lets_in.update((~out[queries & ~both & ~always]).tolist())
        shuts_positions |= bool(always.any())
        is_causal &= bool(np.all(always == np.triu(np.ones((length, length), bool), 1)))
        is_biased |= not shut.kind.startswith("where") and bool(np.any(free[~always]))
    if lets_in == {False, True}:
        return Judged("what masks its scores shuts out some of the padding only")
    return Judged("", lets_in != {True}, shuts_positions, is_causal, is_biased)


def _is_same(shut: Shut, added: NDArray[np.float64], free: NDArray[np.float64]) -> bool:
    largest = float(np.abs(free).max(initial=1.0))
    return shut.kind.startswith("where") or bool(np.all(np.abs(added - free) <= _SAME * largest))


def _has_mask(softmax: ir.Node) -> bool:
    """Tell whether the mask is among the summands of what a softmax reads."""
    waiting = [softmax.inputs[0]]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if is_mask(value):
            return True
        if node is not None and node.op_type in ("Add", "Cast", "Identity", "Max", "Sub"):
            waiting += node.inputs[:1] if node.op_type == "Sub" else node.inputs
    return False
