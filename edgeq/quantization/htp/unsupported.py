"""Name the part of a model that cannot be quantised for HTP, the module near it, and the targets that may take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import constant, readers, scalar

WAY_OUT = "Targets for LiteRT, Ethos-U, ONNX Runtime or OpenVINO may take it: `edgeq check MODEL --target NAME` says"
_FAR = 60  # operators between one that is refused and the weight that names its module


def refusal(node: ir.Node, found: str = "") -> str:
    """Write the refusal of a node: its name, operator and module, the part of the model, and the way out.

    Args:
        node: the operator that cannot be quantised.
        found: the reason, unless the node is of a known part; empty: the operator itself is the reason.
    """
    why = known_part(node) or found or f"{node.op_type} has no form for HTP"
    module = next(_modules(node), "")
    return f"{node.name} ({node.op_type}{f', near {module}' if module else ''}): {why}. {WAY_OUT}."


def known_part(node: ir.Node) -> str:
    """Give the sentence for the unsupported part (RMSNorm, counted positions, ...) that a node belongs to, or ""."""
    return next((said for is_part, said in _PARTS if is_part(node)), "")


def _divides_by_mean_square(node: ir.Node) -> bool:
    is_square = node.op_type == "Pow" and scalar(node.inputs[1]) == 2.0
    is_square = is_square or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1])
    return is_square and any(reader.op_type == "ReduceMean" for reader in readers(node.outputs[0]))


def _counts_tokens(node: ir.Node) -> bool:
    """Tell whether a node compares token ids with the padding's and a CumSum counts positions from that."""
    reads_ids = any(value is not None and value.name == "input_ids" for value in node.inputs)
    return reads_ids and any(each.op_type == "CumSum" for each in _onwards(node))


_PARTS: tuple[tuple[Callable[[ir.Node], bool], str], ...] = (
    (
        _divides_by_mean_square,
        "normalisation by the mean square (RMSNorm) has a form for HTP as x / sqrt(mean(x²) + epsilon) * gain over the "
        "channels alone",
    ),
    (
        _counts_tokens,
        "positions counted from the token ids have a form for HTP where they go up by one from token to token",
    ),
    (
        lambda node: node.op_type == "Where",
        "Where has no form for HTP but in max pooling, where it fills padding for a maximum over the tokens alone",
    ),
)


def _onwards(node: ir.Node) -> Iterator[ir.Node]:
    """Give a node and those that read what it makes, the nearest first."""
    waiting, seen = [node], {node}
    for each in waiting:
        yield each
        if len(seen) < _FAR:
            found = (reader for value in each.outputs for reader in readers(value))
            new = [reader for reader in dict.fromkeys(found) if reader not in seen]
            seen.update(new)
            waiting += new


def _modules(node: ir.Node) -> Iterator[str]:
    """Give the modules whose weights make a node's positions, or are read from it on, as exporters name them."""
    for each in (*_positions(node), *_onwards(node)):
        names = (str(value.name).partition("/")[0] for value in each.inputs if value and constant(value) is not None)
        yield from (name.rpartition(".")[0] for name in names if "." in name)


def _positions(node: ir.Node) -> Iterator[ir.Node]:
    """Give what makes the operands that follow from sizes alone."""
    waiting = [value for value in node.inputs if follows_from_sizes(value)]
    for value in waiting:
        maker = value.producer() if value is not None else None
        if maker is not None and len(waiting) < _FAR:
            yield maker
            waiting += maker.inputs
