"""Recognise the inputs and outputs of a user's graph, and replace its inputs by int64 token ids and mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.data.tokens import Feeds
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.onnx.foreign_inputs import HINTS, IDS, MASK, POSITIONS, SEGMENTS, WHOLE, refuse_foreign
from edgeq.graph.edit import add_constant, dims, made_by

EMBEDDING, HIDDEN = "sentence_embedding", "last_hidden_state"

# Exporters' names of token vectors, in the order of trying; without one of them the first output of rank 3 is taken.
_HIDDEN_NAMES = (HIDDEN, "token_embeddings", "hidden_states")
_HEAD_NAMES = ("logit", "score", "prob")  # parts of the names of what a task's head gives


@dataclass(frozen=True)
class Inputs:
    """Hold the role and the dtype of each input of the user's file.

    Attributes:
        roles: the file's own name -> one of IDS, MASK, SEGMENTS, POSITIONS.
        dtypes: the file's own name -> numpy's dtype.
    """

    roles: dict[str, str]
    dtypes: dict[str, str]

    def named(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        """Map the file's own input names to arrays of its own dtypes."""
        known = {
            IDS: feeds.input_ids,
            MASK: feeds.attention_mask,
            SEGMENTS: np.zeros_like(feeds.input_ids),
            POSITIONS: np.broadcast_to(np.arange(feeds.input_ids.shape[1]), feeds.input_ids.shape),
        }
        return {name: np.ascontiguousarray(known[role], self.dtypes[name]) for name, role in self.roles.items()}


def roles(model: ir.Model, name: str) -> Inputs:
    """Recognise the inputs by name and dtype.

    Raises:
        Unsupported: an input is no [batch, sequence] of whole numbers with both axes free, or none can be told to be
            the token ids.
    """
    found: dict[str, str] = {}
    rest = []
    refuse_foreign(model, name)
    for value in model.graph.inputs:
        lowered = str(value.name).lower()
        role = next((role for hint, role in HINTS if hint in lowered), None)
        if role is None or role in found.values():
            rest.append(str(value.name))
        else:
            found[str(value.name)] = role
    if len(rest) != 1:
        raise Unsupported(
            f"{name}: its inputs are {', '.join(str(value.name) for value in model.graph.inputs)}; edgeq knows token "
            f"ids, and beside them {MASK}, {SEGMENTS} and {POSITIONS}. Rename them so, or cut the others off."
        )
    found[rest[0]] = IDS
    dtypes = {str(value.name): value.dtype.numpy().name for value in model.graph.inputs if value.dtype is not None}
    return Inputs(found, dtypes)


def take_tokens(model: ir.Model, inputs: Inputs) -> None:
    """Replace the inputs by int64 `input_ids` and `attention_mask`; token types become 0, positions 0, 1, 2, ..."""
    graph = model.graph
    for name in (IDS, MASK):
        free_name(graph, name)
    made = {role: _input(role) for role in (IDS, MASK)}
    olds = list(graph.inputs)
    first = next(iter(graph))
    for old in olds:
        role = inputs.roles[str(old.name)]
        if role in made:
            new = made[role]
            if old.dtype is not None and old.dtype != ir.DataType.INT64:
                new = _before(first, "Cast", [new], f"{role}/cast", {"to": int(old.dtype)})
        else:
            new = _derived(graph, first, made[IDS], role, old.dtype or ir.DataType.INT64)
        for use in tuple(old.uses()):
            use.node.replace_input_with(use.idx, new)
    for old in olds:
        graph.inputs.remove(old)
    graph.inputs.extend(made.values())


def free_name(graph: ir.Graph, name: str) -> None:
    """Rename a node's output that has this name."""
    for node in graph:
        for value in node.outputs:
            if value.name == name:
                value.name = f"given/{name}"


def drop_index_casts(model: ir.Model) -> None:
    """Bypass a Cast between int32 and int64 in front of Gather's indices, Shape and Cast; dtypes must be known."""
    for node in model.graph:
        position = {"Gather": 1, "Shape": 0, "Cast": 0}.get(node.op_type)
        while position is not None:
            cast = made_by(node.inputs[position], "Cast")
            before = cast.inputs[0] if cast is not None else None
            if cast is None or before is None or cast.outputs[0].dtype not in WHOLE or before.dtype not in WHOLE:
                break
            node.replace_input_with(position, before)


def _derived(graph: ir.Graph, first: ir.Node, ids: ir.Value, role: str, dtype: ir.DataType) -> ir.Value:
    """Compute token types (zeros) or positions (0, 1, 2, ...) from the shape of the token ids."""
    whole = np.dtype(dtype.numpy())
    if role == SEGMENTS:
        shape = _before(first, "Shape", [ids], "segment/shape")
        return _before(first, "Expand", [add_constant(graph, "segment/zero", np.zeros((), whole)), shape], "segment")
    # Sliced from a constant, so that the position table can be sliced, not looked up: see passes/direct_position.py.
    # 2 ** 15 exceeds the length of every table that is supported.
    count = add_constant(graph, "position/all", np.arange(1 << 15, dtype=whole)[None])
    length = _before(first, "Shape", [ids], "position/length", {"start": 1, "end": 2})
    start = add_constant(graph, "position/start", np.array([0], np.int64))
    axis = add_constant(graph, "position/axis", np.array([1], np.int64))
    return _before(first, "Slice", [count, start, length, axis], "position")


def _input(name: str) -> ir.Value:
    shape = ir.Shape(["batch", "sequence"])
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=shape)


def _before(
    first: ir.Node, op_type: str, inputs: list[ir.Value], name: str, attributes: dict[str, int] | None = None
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes or {}, name=name)
    node.outputs[0].name = name
    if isinstance(first.graph, ir.Graph):
        first.graph.insert_before(first, node)
    return node.outputs[0]


@dataclass(frozen=True)
class Outputs:
    """Name the output with the vectors and the one with the token vectors; one of them may be None."""

    embedding: str | None
    hidden: str | None


def outputs(model: ir.Model, pooling: str | None, name: str) -> Outputs:
    """Find the outputs with the vectors and with the token vectors, by name and rank.

    Args:
        model: the graph.
        pooling: the option `--pooling`; with it the token vectors are taken.
        name: for messages.

    Raises:
        ConfigError: a pooling is given, but the only output is vectors.
        Unsupported: neither of the two is found.
    """
    given = [str(value.name) for value in model.graph.outputs]
    ranks = {
        str(value.name): len(dims(value) or [])
        for value in model.graph.outputs
        if not any(part in str(value.name).lower() for part in _HEAD_NAMES)
    }
    threes = [item for item, rank in ranks.items() if rank == 3]
    twos = [item for item, rank in ranks.items() if rank == 2]
    named = [item for item in _HIDDEN_NAMES if item in ranks]
    hidden = next(iter(named or threes), None)
    if EMBEDDING in ranks:
        embedding: str | None = EMBEDDING
    else:
        embedding = twos[0] if hidden is None and len(twos) == 1 else None
    if embedding is not None and pooling is not None and hidden is None:
        raise ConfigError(f"{name}: its output {embedding} is one vector a text already; drop --pooling {pooling}")
    if embedding is None and hidden is None:
        raise Unsupported(
            f"{name}: its outputs are {', '.join(given)}; {EMBEDDING}[batch, dim] or {HIDDEN}[batch, sequence, dim] is "
            "needed. Export the encoder without its task's head."
        )
    return Outputs(None if pooling is not None else embedding, hidden)
