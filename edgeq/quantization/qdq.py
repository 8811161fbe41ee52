"""Write QuantizeLinear and DequantizeLinear with int8, int16, uint8 or uint16 parameters behind a graph's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph.edit import add_constant, add_node, add_node_after, checked, readers
from edgeq.graph.roles import Role
from edgeq.quantization import affine
from edgeq.quantization.affine import Affine

LOWEST_IR_VERSION = 10  # of opset 21
HEADROOM = 1.25  # of 16-bit ranges over what was observed: it costs a third of a bit, and saturation costs the text
_INT32 = np.iinfo(np.int32)

Refuse = Callable[[ir.Node, str], str]  # the sentence for a node that cannot be quantised; "": its operator cannot be


class Quantized(NamedTuple):
    """Hold a QDQ model, the names of its integer weight products, and of those that stay float by the scheme."""

    model: onnx.ModelProto
    integer_products: tuple[str, ...]
    float_products: tuple[str, ...]


@dataclass(frozen=True)
class QuantizedValue:
    """Hold a tensor as DequantizeLinear gives it back, with its quantisation parameters."""

    value: ir.Value
    params: Affine
    bits: int


def plain_refusal(node: ir.Node, found: str = "") -> str:
    """Name a node and what was found, or its operator."""
    return f"{node.name}: {found or f'{node.op_type} has no integer form; use a scheme that leaves it float'}"


class QdqBuilder:
    """Quantise the tensors of a graph to int8 and int16, and hold which are; int16 has no zero point.

    Attributes:
        graph: edited in place.
        observed: statistics by the names that tensors had before they were quantised.
        quantized: the tensors that are, as they were first stored.
        converted: their copies in other bits, by tensor and bits.
        fixed: parameters that follow from a rewrite, not from what was observed, by the tensor's name.
    """

    dtypes: Mapping[int, type[np.integer[Any]]] = {8: np.int8, 16: np.int16}

    def __init__(
        self, graph: ir.Graph, observed: Observed, refusal: Refuse = plain_refusal, steps_of_16bit: int = 1,
        has_placeholders: bool = False,
    ) -> None:  # fmt: skip
        """Begin with no tensor quantised.

        Args:
            graph: edited in place.
            observed: the calibration's statistics; those of moved tensors are added.
            refusal: writes why a node cannot be quantised.
            steps_of_16bit: how many int16 steps make one int8 step when a tensor is requantised from 8 to 16 bits.
            has_placeholders: whether a tensor without statistics is taken to lie between -1 and 1; else that raises.
        """
        self.graph = graph
        self.observed = observed
        self.refusal = refusal
        self._steps_of_16bit = steps_of_16bit
        self._has_placeholders = has_placeholders
        self.quantized: dict[ir.Value, QuantizedValue] = {}
        self.converted: dict[tuple[ir.Value, int], QuantizedValue] = {}
        self._without_zero_point: dict[ir.Value, QuantizedValue] = {}
        self.fixed: dict[str, Affine] = {}

    # what was observed -----------------------------------------------------------------------------------------------

    def statistics(self, value: ir.Value | str) -> Statistics:
        """Give what was observed of a tensor.

        Raises:
            EdgeqError: nothing was.
        """
        name = value if isinstance(value, str) else str(value.name)
        if name in self.observed:
            return self.observed[name]
        if self._has_placeholders:
            return Statistics(np.full(1, -1.0, np.float32), np.full(1, 1.0, np.float32))
        raise EdgeqError(f"{name}: the calibration has no statistics of it")

    def largest(self, value: ir.Value) -> float:
        """Give the largest magnitude observed."""
        return self.statistics(value).largest

    def keep_statistics(self, value: ir.Value, source: QuantizedValue) -> None:
        """Let a tensor that moves the values of another have its statistics."""
        name, before = str(value.name), self.name_of(source)
        if name not in self.observed and before in self.observed:
            self.observed[name] = self.observed[before]

    def name_of(self, quantized: QuantizedValue) -> str:
        """Give the name that a tensor had before it was quantised."""
        return str(quantized.value.name).removesuffix("/dequantized")

    # parameters ------------------------------------------------------------------------------------------------------

    def cover(self, low: float, high: float, bits: int) -> Affine:
        """Give parameters for a range: int16 symmetric, int8 asymmetric."""
        return symmetric(max(-low, high), 16) if bits == 16 else affine.asymmetric(low, high, bits, signed=True)

    def range(self, value: ir.Value, bits: int) -> Affine:
        """Give parameters for what was observed, 16 bits with headroom, unless a rewrite has fixed them."""
        if str(value.name) in self.fixed:
            return self.fixed[str(value.name)]
        seen = self.statistics(value)
        room = HEADROOM if bits == 16 else 1.0
        return self.cover(float(seen.minimum.min()) * room, float(seen.maximum.max()) * room, bits)

    def to_16bit(self, params: Affine) -> Affine:
        """Give int16 parameters that hold all int8 values: exact multiples where there is no zero point."""
        if params.zero_point == 0:
            return Affine(params.scale / self._steps_of_16bit, 0, -32768, 32767)
        low, high = affine.dequantize([params.low, params.high], params).tolist()
        return self.cover(low, high, 16)

    # tensors ---------------------------------------------------------------------------------------------------------

    def home(self, value: ir.Value | None, node: ir.Node) -> QuantizedValue:
        """Give a tensor in the bits that it was stored in.

        Raises:
            Unsupported: it was not quantised.
        """
        if value is None or value not in self.quantized:
            found = f"reads {value.name if value is not None else None}, which has no integer form"
            raise Unsupported(self.refusal(node, found))
        return self.quantized[value]

    def read(self, value: ir.Value | None, bits: int, node: ir.Node) -> QuantizedValue:
        """Give a tensor in the bits that an operator reads, converted once for all its readers.

        Raises:
            Unsupported: it was not quantised.
        """
        home = self.home(value, node)
        if home.bits == bits:
            return home
        key = (home.value, bits)
        if key not in self.converted:
            name = self.name_of(home)
            if bits == 16:
                params = self.to_16bit(home.params)
            else:
                seen = self.statistics(name)
                params = self.cover(float(seen.minimum.min()), float(seen.maximum.max()), bits)
            self.converted[key] = self.requantize(home, params, bits, f"{name}/{bits}bit")
        return self.converted[key]

    def read_without_zero_point(self, value: ir.Value | None, bits: int, node: ir.Node) -> QuantizedValue:
        """Give a tensor in the bits that an operator reads, without a zero point, converted once for all such readers.

        Raises:
            Unsupported: it was not quantised.
        """
        home = self.home(value, node)
        if home.bits == bits and home.params.zero_point == 0:
            return home
        if home.bits != bits and bits == 16:
            return self.read(value, bits, node)
        if home.value not in self._without_zero_point:
            name = self.name_of(home)
            params = symmetric(self.statistics(name).largest, bits)
            made = self.requantize(home, params, bits, f"{name}/{bits}bit/symmetric")
            self._without_zero_point[home.value] = made
        return self._without_zero_point[home.value]

    def requantize(self, home: QuantizedValue, params: Affine, bits: int, name: str) -> QuantizedValue:
        """Quantise a dequantised tensor again, with other parameters."""
        producer = home.value.producer()
        if producer is None:
            raise ValueError(f"{name}: made by nobody")
        return QuantizedValue(self.pair(producer, home.value, name, params, bits), params, bits)

    def store(self, node: ir.Node, output: ir.Value, params: Affine, bits: int) -> QuantizedValue:
        """Quantise a node's output behind it; who reads it is served when its turn comes."""
        self.quantized[output] = QuantizedValue(self.pair(node, output, str(output.name), params, bits), params, bits)
        return self.quantized[output]

    def store_integers(self, node: ir.Node, params: Affine, bits: int) -> QuantizedValue:
        """Dequantise a node's output that is integers already, because it looks them up in a table of integers."""
        output = node.outputs[0]
        output.dtype = ir.DataType.from_numpy(np.dtype(self.dtypes[bits]))
        inputs = [output, *self.parameters(str(output.name), params, bits)]
        real = add_node_after(node, "DequantizeLinear", inputs, f"{output.name}/dequantized")
        self.quantized[output] = QuantizedValue(real, params, bits)
        return self.quantized[output]

    def pair(self, after: ir.Node, value: ir.Value, name: str, params: Affine, bits: int) -> ir.Value:
        """Insert QuantizeLinear and DequantizeLinear behind a node, and give the dequantised value."""
        parameters = self.parameters(name, params, bits)
        quantized = add_node_after(after, "QuantizeLinear", [value, *parameters], f"{name}/quantized")
        place = next(node for node in readers(value) if node.outputs[0] is quantized)
        return add_node_after(place, "DequantizeLinear", [quantized, *parameters], f"{name}/dequantized")

    def quantize(
        self, before: ir.Node, value: ir.Value, params: Affine, bits: int, name: str, role: Role | None = None
    ) -> QuantizedValue:
        """Insert QuantizeLinear, with a role where it has one, and DequantizeLinear in front of a node."""
        parameters = self.parameters(name, params, bits)
        quantized = add_node(before, "QuantizeLinear", [value, *parameters], f"{name}/quantized", role=role)
        real = add_node(before, "DequantizeLinear", [quantized, *parameters], f"{name}/dequantized")
        return QuantizedValue(real, params, bits)

    def quantize_once(
        self, value: ir.Value, params: Affine, bits: int, node: ir.Node, role: Role | None = None
    ) -> QuantizedValue:
        """Quantise what follows from mask or sizes alone in front of its first reader, once for all readers."""
        key = (value, bits)
        if key not in self.converted:
            self.converted[key] = self.quantize(node, value, params, bits, f"{value.name}/{bits}bit", role)
        return self.converted[key]

    # constants -------------------------------------------------------------------------------------------------------

    def parameters(self, name: str, params: Affine, bits: int) -> list[ir.Value]:
        """Store a scale and a zero point, once for each name."""
        made = []
        for kind, array in (
            ("scale", np.array(params.scale, np.float32)),
            ("zero_point", np.array(params.zero_point, self.dtypes[bits])),
        ):
            known = self.graph.initializers.get(f"{name}/{kind}")
            made.append(known if known is not None else add_constant(self.graph, f"{name}/{kind}", array))
        return made

    def integers(self, name: str, array: NDArray[np.float32], params: Affine, bits: int) -> ir.Value:
        """Store the integers of a constant."""
        return add_constant(self.graph, f"{name}/codes", affine.quantize(array, params).astype(self.dtypes[bits]))

    def table(self, name: str, array: NDArray[np.float32], bits: int, node: ir.Node) -> QuantizedValue:
        """Store a constant that a node reads."""
        params = self.cover(float(array.min()), float(array.max()), bits)
        inputs = [self.integers(name, array, params, bits), *self.parameters(name, params, bits)]
        return QuantizedValue(add_node(node, "DequantizeLinear", inputs, f"{name}/dequantized"), params, bits)

    def weight(self, node: ir.Node, values: NDArray[np.int8], scales: NDArray[np.float32]) -> ir.Value:
        """Store the int8 weight of a MatMul or Gemm with a scale for each output channel."""
        return int8_weight(node, f"{node.name}/weight", values, scales, axis=1)


class UnsignedQdqBuilder(QdqBuilder):
    """Quantise to uint8 and uint16, whose zero point is wherever the range puts it, in 16 bits too."""

    dtypes: Mapping[int, type[np.integer[Any]]] = {8: np.uint8, 16: np.uint16}

    def cover(self, low: float, high: float, bits: int) -> Affine:
        """Give asymmetric parameters for a range."""
        return affine.asymmetric(low, max(high, low + 1e-9), bits)

    def to_16bit(self, params: Affine) -> Affine:
        """Give uint16 parameters that hold all uint8 values: 257 steps for each, so that both hold the same range."""
        return Affine(params.scale / 257, params.zero_point * 257, 0, 65535)


def int8_weight(node: ir.Node, name: str, values: NDArray[np.int8], scales: NDArray[np.float32], axis: int) -> ir.Value:
    """Store int8 weights with a scale for each channel of an axis, and give what DequantizeLinear makes of them.

    Args:
        node: reads the weight; several products may share one, so DequantizeLinear has the product's name.
        name: of the stored weight.
        values: int8, any shape.
        scales: float32[channels].
        axis: of the channels.
    """
    graph = graph_of(node)
    inputs = [
        add_constant(graph, f"{name}/codes", values),
        add_constant(graph, f"{name}/scale", scales),
        add_constant(graph, f"{name}/zero_point", np.zeros(scales.shape, np.int8)),
    ]
    return add_node(node, "DequantizeLinear", inputs, f"{node.name}/weight", {"axis": axis})


def int32_bias(
    before: ir.Node, product: str, name: str, bias: NDArray[np.floating], step: NDArray[np.floating]
) -> ir.Value:
    """Store an int32 bias in steps of the sums that it is added to, and give what DequantizeLinear makes of it.

    Args:
        before: the node that reads it.
        product: the name of the weight product.
        name: of the stored bias.
        bias: float[channels].
        step: the input's scale times the weight's, float[channels] or one number.
    """
    graph = graph_of(before)
    values = np.clip(np.rint(bias.astype(np.float64) / step), _INT32.min + 1, _INT32.max).astype(np.int32)
    inputs = [
        add_constant(graph, f"{name}/codes", values),
        add_constant(graph, f"{name}/scale", np.asarray(step, np.float32)),
    ]
    return add_node(before, "DequantizeLinear", inputs, f"{product}/bias", {"axis": 0} if np.ndim(step) else None)


def graph_of(node: ir.Node) -> ir.Graph:
    """Give the graph that a node stands in."""
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.name}: stands in no graph")
    return node.graph


def finished(model: ir.Model) -> onnx.ModelProto:
    """Give a model whose tensors were all quantised, sorted and checked; shapes are inferred anew."""
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    for value in (value for node in model.graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    model.ir_version = LOWEST_IR_VERSION
    return checked(model)


def symmetric(largest: float, bits: int) -> Affine:
    """Give signed parameters without a zero point that hold -largest .. largest."""
    limit = 2 ** (bits - 1) - 1
    return Affine(float(np.float32(max(largest, 1e-12) / limit)), 0, -limit - 1, limit)
