"""Name the part of a model that cannot be quantised for HTP, the module near it, and the targets that may take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from edgeq.graph.dataflow import follows_from_sizes
from edgeq.graph.edit import constant, made_by, readers, scalar
from edgeq.graph.operators import SAME_VALUES

WAY_OUT = "Targets for LiteRT, Ethos-U, ONNX Runtime or OpenVINO may take it: `edgeq check MODEL --target NAME` says"
_FAR = 60  # operators between one that is refused and the weight that names its module
_SIGNED_COPIES = SAME_VALUES | {"Neg"}


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
    """Give the sentence for the unsupported part (rotary positions, RMSNorm, ...) that a node belongs to, or ""."""
    return next((said for is_part, said in _PARTS if is_part(node)), "")


def _rotates(node: ir.Node) -> bool:
    """Tell whether a node multiplies by cosines or sines of positions (RoPE), or by rows of a table of them."""
    if node.op_type != "Mul":
        return False
    for value in node.inputs:
        start = value
        while (step := made_by(value, *_SIGNED_COPIES, "Concat", "Mul", "Split")) is not None:
            value = step.inputs[0]
        is_table = value is not start and constant(value) is not None and follows_from_sizes(start)
        if is_table or (made_by(value, "Cos", "Sin") is not None and follows_from_sizes(value)):
            return True
    return False


def _divides_by_mean_square(node: ir.Node) -> bool:
    is_square = node.op_type == "Pow" and scalar(node.inputs[1]) == 2.0
    is_square = is_square or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1])
    return is_square and any(reader.op_type == "ReduceMean" for reader in readers(node.outputs[0]))


def _counts_tokens(node: ir.Node) -> bool:
    """Tell whether a node compares token ids with the padding's and a CumSum counts positions from that."""
    reads_ids = any(value is not None and value.name == "input_ids" for value in node.inputs)
    return reads_ids and any(each.op_type == "CumSum" for each in _onwards(node))


def _masks_tokens(node: ir.Node) -> bool:
    for value in node.inputs if node.op_type == "Mul" else ():
        while (step := made_by(value, *_SIGNED_COPIES)) is not None:
            value = step.inputs[0]
        if value is not None and value.is_graph_input() and value.name == "attention_mask":
            return True
    return False


def _biases_scores(node: ir.Node) -> bool:
    """Tell whether a node adds what positions give to attention scores."""
    if node.op_type != "Add" or not any(map(follows_from_sizes, node.inputs)):
        return False
    behind = readers(node.outputs[0])
    behind += [each for add in behind if add.op_type == "Add" for each in readers(add.outputs[0])]
    return any(each.op_type == "Softmax" for each in behind)


def _limits_attention(node: ir.Node) -> bool:
    """Tell whether a node adds a causal or local mask to scores.

    The mask of padding is (kept - 1) * size; here `kept` is itself a product with the positions that each may see.
    """
    for value in node.inputs if node.op_type == "Add" else ():
        scaled = made_by(value, "Mul")
        shifted = (
            next((made_by(each, "Sub") for each in scaled.inputs if made_by(each, "Sub")), None) if scaled else None
        )
        if shifted is not None and made_by(shifted.inputs[0], "Mul") is not None:
            return True
    return False


_PARTS: tuple[tuple[Callable[[ir.Node], bool], str], ...] = (
    (
        _rotates,
        "rotary positions have no form for HTP: cosines and sines of where a token stands turn queries and keys, and "
        "only a table that is added to the tokens is taken",
    ),
    (
        _divides_by_mean_square,
        "normalisation by the mean square (RMSNorm) has no form for HTP; LayerNormalization, which subtracts the mean, "
        "has one",
    ),
    (
        _counts_tokens,
        "positions counted from the token ids, padding left out, have no form for HTP; positions that are a token's "
        "place have one",
    ),
    (
        _masks_tokens,
        "tokens multiplied by the attention mask inside the model have no form for HTP; attention's scores and "
        "poolings take the mask",
    ),
    (
        _biases_scores,
        "a bias by positions on attention's scores (ALiBi, T5's bias by distance) has no form for HTP; positions that "
        "are added to the tokens have one",
    ),
    (
        _limits_attention,
        "causal or local attention has no form for HTP, whose mask is looked up by tokens alone",
    ),
    (
        lambda node: node.op_type == "Where",
        "Where has no form for HTP (max pooling chooses by the mask for each token and channel, and here the mask is "
        "looked up for whole tokens; mean, weighted mean, first- and last-token pooling are taken)",
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
