"""Walk a float graph and quantise each node by the function of its operator; steps that all kinds share are here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import onnx_ir as ir

from edgeq.errors import Unsupported, UnsupportedRange
from edgeq.graph.edit import constant, is_constant, made_by, scalar
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import HEADROOM, QdqBuilder, QuantizedValue
from edgeq.quantization.rewrites.observe_row_maxima import ROW_MAXIMUM
from edgeq.records import Scheme


@dataclass(frozen=True)
class Refusal:
    """Say why one operator cannot be quantised.

    Attributes:
        node: its name.
        operator: its ONNX operator.
        sentence: what quantising says when it raises.
        is_certain: whether it follows from the model's structure; else from the ranges of this calibration.
    """

    node: str
    operator: str
    sentence: str
    is_certain: bool

    @classmethod
    def of(cls, error: Unsupported, node: str = "", operator: str = "") -> Refusal:
        """Give the refusal that an error states."""
        return cls(node, operator, str(error), not isinstance(error, UnsupportedRange))


@dataclass(kw_only=True)
class Walk:
    """Hold what is known while one graph is quantised.

    Attributes:
        builder: writes QuantizeLinear and DequantizeLinear.
        scheme: bits of weights and tables.
        refusals: where they are collected instead of raised.
        of_mask: values that follow from the attention mask alone.
        of_sizes: values that follow from the sizes of the inputs alone.
        done: nodes that were quantised with an earlier one.
        products: names of the integer weight products so far.
    """

    builder: QdqBuilder
    scheme: Scheme
    refusals: list[Refusal] | None = None
    of_mask: set[ir.Value] = field(default_factory=set)
    of_sizes: set[ir.Value] = field(default_factory=set)
    done: set[ir.Node] = field(default_factory=set)
    products: list[str] = field(default_factory=list)


W = TypeVar("W", bound=Walk)


def quantize_nodes(
    walk: W, quantizers: Mapping[str, Callable[[W, ir.Node], None]], is_lookup: Callable[[W, ir.Node], bool]
) -> None:
    """Quantise every node of a graph whose values do not follow from mask and sizes alone.

    Where refusals are collected, what cannot be quantised is taken to lie between -1 and 1, so that its readers are
    not refused for it.

    Args:
        walk: of the graph, which is edited in place.
        quantizers: by ONNX operator.
        is_lookup: whether a node looks rows of a stored table up, whatever its indices follow from.

    Raises:
        Unsupported: an operator cannot be quantised, and refusals are not collected.
        EdgeqError: a tensor has no statistics.
    """
    builder = walk.builder
    walk.of_mask.update(item for item in builder.graph.inputs if item.name == "attention_mask")
    for node in list(builder.graph):
        if node in walk.done or (not is_lookup(walk, node) and _follows_from_inputs(walk, node)):
            continue
        try:
            if node.op_type not in quantizers:
                raise Unsupported(builder.refusal(node, ""))
            quantizers[node.op_type](walk, node)
        except Unsupported as error:
            if walk.refusals is None:
                raise
            walk.refusals.append(Refusal.of(error, str(node.name), node.op_type))
            for output in node.outputs:
                if output not in builder.quantized:
                    builder.store(node, output, builder.cover(-1.0, 1.0, 16), 16)


def _follows_from_inputs(walk: Walk, node: ir.Node) -> bool:
    """Tell whether a node's values follow from sizes, or from the attention mask, alone, and note it."""
    variable = [value for value in node.inputs if value is not None and not is_constant(value)]
    if node.op_type == "Shape" or (variable and all(value in walk.of_sizes for value in variable)):
        walk.of_sizes.update(node.outputs)
        return True
    if variable and all(value in walk.of_mask or value in walk.of_sizes for value in variable):
        walk.of_mask.update(node.outputs)
        return True
    return False


# steps for one operator ----------------------------------------------------------------------------------------------


def move(walk: Walk, node: ir.Node) -> None:
    """Quantise Reshape, Transpose and whatever else moves values: the output has the parameters of the input."""
    source = walk.builder.quantized.get(node.inputs[0]) if node.inputs[0] is not None else None
    if source is None:
        raise Unsupported(walk.builder.refusal(node, ""))
    node.replace_input_with(0, source.value)
    walk.builder.store(node, node.outputs[0], source.params, source.bits)
    walk.builder.keep_statistics(node.outputs[0], source)


def pointwise(walk: Walk, node: ir.Node) -> None:
    """Quantise Relu and Gelu in the bits that their input has."""
    source = walk.builder.home(node.inputs[0], node)
    node.replace_input_with(0, source.value)
    walk.builder.store(node, node.outputs[0], walk.builder.range(node.outputs[0], source.bits), source.bits)


def read_16bit(walk: Walk, node: ir.Node, position: int) -> None:
    """Let a node read an operand in 16 bits; a constant is stored so."""
    value = node.inputs[position]
    array = constant(value)
    if value is not None and array is not None:
        operand = walk.builder.table(f"{node.name}/{value.name}", array, 16, node)
    else:
        operand = walk.builder.read(value, 16, node)
    node.replace_input_with(position, operand.value)


def score_params(walk: Walk, masked: ir.Node, bits: int, below: float) -> Affine:
    """Cover attention scores down to where exp leaves nothing beside the smallest maximum of a row; others saturate.

    Args:
        walk: of the graph.
        masked: the Softmax, or the Add of the mask.
        bits: of the scores; 16 bits have headroom at both ends.
        below: how far below the smallest maximum a masked score lies.
    """
    value = masked.outputs[0] if masked.op_type == "Add" else masked.inputs[0]
    if value is None:
        raise Unsupported(walk.builder.refusal(masked, ""))
    seen, rows = walk.builder.statistics(value), walk.builder.statistics(f"{value.name}{ROW_MAXIMUM}")
    low, high = float(rows.minimum.min()) - below, float(seen.maximum.max())
    # A causal mask puts scores of every text far below: they need no room.
    room = (HEADROOM - 1.0) * (high - max(float(seen.minimum.min()), low)) if bits == 16 else 0.0
    return walk.builder.cover(low - room, high + room, bits)


def mask_size(mask: ir.Value | None) -> float:
    """Give how far below 0 a mask of the form (mask - 1) * size moves a score.

    Raises:
        Unsupported: the mask has another form.
    """
    product = made_by(mask, "Mul")
    sizes = [size for value in product.inputs if (size := scalar(value)) is not None] if product is not None else []
    if not sizes:
        raise Unsupported("the attention mask is not of the form (mask - 1) * size")
    return sizes[0]


def name_output(walk: Walk, result: QuantizedValue) -> None:
    """Let the graph's output be what DequantizeLinear gives, under the output's name."""
    graph = walk.builder.graph
    output = graph.outputs[0]
    name = str(output.name)
    output.name = f"{name}/real"
    result.value.name = name
    result.value.shape, result.value.dtype = output.shape, ir.DataType.FLOAT
    graph.outputs[0] = result.value
