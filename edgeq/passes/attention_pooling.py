"""Write the pooling of an image's tokens by attention with one learned query with the batch in front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.data.batches import PIXELS
from edgeq.graph import roles
from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, is_read_once, made_by, readers, required
from edgeq.graph.evaluate import computed
from edgeq.graph.linear import Linear
from edgeq.graph.roles import Role

_SWAPPED, _KEYS = [1, 0, 2], [1, 2, 0]  # of [tokens, batch, channels], and of keys [tokens, heads, channels]
_PARTED = [3, 1, 2, 0, 4]  # keys and values before all else


def attention_pooling(model: ir.Model) -> Rewrites:
    """Rewrite torch's `MultiheadAttention` of one learned query over an image's tokens.

    Before::

        query ─ Tile(batch) ─ Transpose ─ MatMul ─ Reshape ─────────────────┐
        x ─ Transpose[1, 0, 2] ─ MatMul(W) ─ Add(b) ─ Reshape ─ … ─ Gather ─┴ MatMul ─ Softmax ─ MatMul ─ Transpose
          ─ Reshape[-1, c] ─ MatMul ─ Add ─ Reshape[1, -1, c] ─ Transpose[1, 0, 2]

    After::

        x ─┬─ MatMul(Wk) ─ Add(bk) ─ Reshape ─ Transpose ─ MatMul(query, ·) ─ Softmax ─┐
           └─ MatMul(Wv) ─ Add(bv) ─ Reshape ─ Transpose ──────────────────────────────┴ MatMul ─ Transpose ─ Reshape
             ─ MatMul ─ Add

    The query is the same for all images: it is a constant, [1, heads, 1, channels].
    """
    image = next((value for value in model.graph.inputs if value.name == PIXELS), None)
    if image is None:
        return Rewrites(0)
    count = 0
    for softmax in list(model.graph):
        found = _found(softmax) if softmax.op_type == "Softmax" else None
        sizes = [size if isinstance(size, int) else 1 for size in dims(image) or ()]
        if found is not None:
            _write(model.graph, found, computed(found.query, {PIXELS: np.ones(sizes, np.int64)}))
            count += 1
    return Rewrites(count)


@dataclass(frozen=True)
class _Pooling:
    """Hold the parts of one pooling: what it reads, its query and projections, and what it gives."""

    softmax: ir.Node
    x: ir.Value
    query: ir.Value
    projection: Linear  # of keys and values
    keys: int  # their place in the projection, 0 or 1
    tokens: int
    width: int  # of one head
    product: ir.Node  # with the projection of the result
    bias: ir.Value | None
    result: ir.Value


def _found(softmax: ir.Node) -> _Pooling | None:
    scores, following = made_by(softmax.inputs[0], "MatMul"), readers(softmax.outputs[0])
    mixed = following[0] if len(following) == 1 and following[0].op_type == "MatMul" else None
    if scores is None or mixed is None or scores.inputs[0] is None or not follows_from_sizes(scores.inputs[0]):
        return None
    keys, values = _parted(scores.inputs[1], _KEYS), _parted(mixed.inputs[1], _SWAPPED)
    end = _result(mixed)
    if keys is None or values is None or end is None or keys[0] is not values[0] or keys[2:] != values[2:]:
        return None
    projected, place, tokens, width = keys
    add = made_by(projected, "Add")
    made = made_by(add.inputs[0], "MatMul") if add is not None else None
    turned = made_by(made.inputs[0], "Transpose") if made is not None else None
    x = turned.inputs[0] if turned is not None and _order(turned) == _SWAPPED else None
    if add is None or made is None or x is None or {place, values[1]} != {0, 1}:
        return None
    product, bias, result = end
    return _Pooling(softmax, x, scores.inputs[0], Linear(made, add), place, tokens, width, product, bias, result)


def _parted(value: ir.Value | None, order: list[int]) -> tuple[ir.Value, int, int, int] | None:
    """Give what keys or values are cut from, which of two they are, the number of tokens, and the width of a head."""
    steps: list[ir.Node] = []
    for op_type in ("Transpose", "Reshape", "Gather", "Squeeze", "Transpose", "Unsqueeze", "Reshape"):
        step = made_by(value, op_type)
        if step is None:
            return None
        steps.append(step)
        value = step.inputs[0]
    turned, heads, which, _, parted, _, cut = steps
    target, place, two = constant(heads.inputs[1]), constant(which.inputs[1]), constant(cut.inputs[1])
    is_right = _order(turned) == order and _order(parted) == _PARTED and place is not None and place.ndim == 0
    if not is_right or target is None or two is None or place is None or value is None:
        return None
    if len(target) != 3 or target[1] != -1 or len(two) != 4 or two[2] != 2:
        return None
    return value, int(place), int(target[0]), int(target[2])


def _result(mixed: ir.Node) -> tuple[ir.Node, ir.Value | None, ir.Value] | None:
    """Give the product behind the heads, its bias, and the value that it ends in, [batch, 1, channels]."""
    node = mixed
    steps: list[ir.Node] = []
    for op_type in ("Transpose", "Reshape", "MatMul", "Add", "Reshape", "Transpose"):
        following = readers(node.outputs[0])
        if not is_read_once(node.outputs[0]) or following[0].op_type != op_type:
            return None
        node = following[0]
        steps.append(node)
    turned, _, product, add, _, back = steps
    bias = next((value for value in add.inputs if constant(value) is not None), None)
    if _order(turned) != _SWAPPED or _order(back) != _SWAPPED or bias is None or constant(product.inputs[1]) is None:
        return None
    return product, bias, back.outputs[0]


def _order(node: ir.Node) -> list[int]:
    return [int(axis) for axis in node.attributes["perm"].as_ints()]


def _write(graph: ir.Graph, found: _Pooling, query: NDArray[np.float32]) -> None:
    add = found.projection.add
    if add is None:
        return
    weight = computed(found.projection.product.inputs[1], {}).astype(np.float32)
    bias = computed(next(value for value in add.inputs if value is not found.projection.product.outputs[0]), {})
    channels, name = weight.shape[1] // 2, str(found.softmax.name)
    before = found.result.producer()
    if before is None:
        return
    heads, shape = channels // found.width, list(found.x.shape or ())
    batch = shape[0] if shape else None

    def written(op_type: str, inputs: list[ir.Value], stem: str, sizes: list[object], **attributes: object) -> ir.Value:
        made = add_node(before, op_type, inputs, f"{name}/{stem}", attributes)
        made.shape, made.dtype = ir.Shape([batch, *sizes]), ir.DataType.FLOAT  # type: ignore[list-item]
        return made

    def stored(stem: str, array: NDArray[np.generic]) -> ir.Value:
        return add_constant(graph, f"{name}/{stem}", np.ascontiguousarray(array))

    parts = {}
    for stem, place, order in (("keys", found.keys, [0, 2, 3, 1]), ("values", 1 - found.keys, [0, 2, 1, 3])):
        columns = slice(place * channels, (place + 1) * channels)
        part = written("MatMul", [found.x, stored(f"{stem}/weight", weight[:, columns])], f"{stem}/product",
                       [found.tokens, channels])  # fmt: skip
        roles.give(required(part.producer()), Role.ATTENTION_POOLING)
        part = written("Add", [part, stored(f"{stem}/bias", bias[columns].astype(np.float32))], stem,
                       [found.tokens, channels])  # fmt: skip
        cut = stored(f"{stem}/shape", np.array([0, found.tokens, heads, found.width], np.int64))
        part = written("Reshape", [part, cut], f"{stem}/heads", [found.tokens, heads, found.width])
        sizes = [found.tokens, heads, found.width]
        parts[stem] = written(
            "Transpose", [part], f"{stem}/turned", [sizes[axis - 1] for axis in order[1:]], perm=order
        )
    asked = stored("query", query.reshape(1, heads, 1, found.width).astype(np.float32))
    scores = written("MatMul", [asked, parts["keys"]], "scores", [heads, 1, found.tokens])
    weights = written("Softmax", [scores], "weights", [heads, 1, found.tokens], axis=-1)
    context = written("MatMul", [weights, parts["values"]], "context", [heads, 1, found.width])
    context = written("Transpose", [context], "context/turned", [1, heads, found.width], perm=[0, 2, 1, 3])
    row = stored("row", np.array([0, 1, channels], np.int64))
    context = written("Reshape", [context, row], "context/row", [1, channels])
    matrix, added = found.product.inputs[1], found.bias
    if matrix is None or added is None:
        return
    width = int((constant(matrix) if constant(matrix) is not None else np.zeros((1, 1))).shape[1])  # type: ignore[union-attr]
    result = written("MatMul", [context, matrix], "product", [1, width])
    result = written("Add", [result, added], "sum", [1, width])
    for use in tuple(found.result.uses()):
        use.node.replace_input_with(use.idx, result)
