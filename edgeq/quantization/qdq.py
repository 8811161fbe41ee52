"""Put codes on the tensors of a graph: QuantizeLinear and DequantizeLinear behind each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph.edit import add_constant, add_node, add_node_after, checked, readers
from edgeq.quantization import affine
from edgeq.quantization.affine import Affine

LOWEST_IR_VERSION = 10  # of opset 21
HEADROOM = 1.25  # of 16-bit ranges over what was observed: it costs a third of a bit, and saturation costs the text
INTEGER_DTYPES: Mapping[int, type[np.integer[Any]]] = {8: np.int8, 16: np.int16}


@dataclass(frozen=True)
class Coded:
    """Hold a dequantised tensor and the parameters of its codes."""

    value: ir.Value
    affine: Affine
    bits: int


class CodedGraph:
    """Hold which tensors of a graph have codes, and add more. Codes are signed; those of 16 bits have no zero point."""

    dtypes = INTEGER_DTYPES

    def __init__(self, graph: ir.Graph, observed: Observed, widening: int = 1) -> None:
        """Begin with no tensor coded; 16-bit copies of 8-bit tensors have so many codes for each step."""
        self.widening = widening
        self.graph = graph
        self.observed = observed
        self.coded: dict[ir.Value, Coded] = {}
        self.converted: dict[tuple[ir.Value, int], Coded] = {}
        self.fixed: dict[str, Affine] = {}  # codes that follow from a rewrite, not from what was observed

    def statistics(self, value: ir.Value) -> Statistics:
        """Give what was observed of a tensor.

        Raises:
            EdgeqError: nothing was.
        """
        name = str(value.name)
        if name not in self.observed:
            raise EdgeqError(f"{name}: the calibration has no statistics of it")
        return self.observed[name]

    def largest(self, value: ir.Value) -> float:
        """Give the largest magnitude observed."""
        return self.statistics(value).largest

    def cover(self, low: float, high: float, bits: int) -> Affine:
        """Give codes for a range: 16 bits symmetric, 8 bits asymmetric."""
        return symmetric(max(-low, high), 16) if bits == 16 else affine.asymmetric(low, high, bits, signed=True)

    def range(self, value: ir.Value, bits: int) -> Affine:
        """Give codes for what was observed: 16 bits symmetric with headroom, 8 bits asymmetric."""
        if str(value.name) in self.fixed:
            return self.fixed[str(value.name)]
        seen = self.statistics(value)
        room = HEADROOM if bits == 16 else 1.0
        return self.cover(float(seen.minimum.min()) * room, float(seen.maximum.max()) * room, bits)

    def wider(self, codes: Affine) -> Affine:
        """Give 16-bit codes for all that 8-bit codes hold: an exact multiple where there is no zero point."""
        if codes.zero_point == 0:
            return Affine(codes.scale / self.widening, 0, -32768, 32767)
        low, high = affine.dequantize([codes.low, codes.high], codes).tolist()
        return self.cover(low, high, 16)

    def read(self, value: ir.Value | None, bits: int, node: ir.Node) -> Coded:
        """Give a tensor in the bits an operator reads, converted once for all its readers."""
        if value not in self.coded:
            raise Unsupported(self.refusal(node, f"reads {value.name if value else None}, which has no integer form"))
        home = self.coded[value]
        if home.bits == bits:
            return home
        key = (home.value, bits)
        if key not in self.converted:
            name = self.name_of(home)
            if bits == 16:
                codes = self.wider(home.affine)
            else:
                seen = self.observed[name]
                codes = self.cover(float(seen.minimum.min()), float(seen.maximum.max()), bits)
            self.converted[key] = self.requantize(home, codes, bits, f"{name}/{bits}bit")
        return self.converted[key]

    def refusal(self, node: ir.Node, found: str) -> str:
        """Write why a node cannot be coded."""
        return f"{node.name}: {found}"

    def name_of(self, coded: Coded) -> str:
        """Give the name that a tensor had before it was coded."""
        return str(coded.value.name).removesuffix("/dequantized")

    def requantize(self, home: Coded, codes: Affine, bits: int, name: str) -> Coded:
        """Put other codes behind a tensor's codes."""
        producer = home.value.producer()
        if producer is None:
            raise ValueError(f"{name}: made by nobody")
        return Coded(self.pair(producer, home.value, name, codes, bits), codes, bits)

    def store(self, node: ir.Node, output: ir.Value, codes: Affine, bits: int) -> None:
        """Put the output's codes behind a node; who reads it is served when visited."""
        self.coded[output] = Coded(self.pair(node, output, str(output.name), codes, bits), codes, bits)

    def pair(self, after: ir.Node, value: ir.Value, name: str, codes: Affine, bits: int) -> ir.Value:
        """Insert QuantizeLinear and DequantizeLinear behind a node, and give the dequantised value."""
        parameters = self.parameters(name, codes, bits)
        quantized = add_node_after(after, "QuantizeLinear", [value, *parameters], f"{name}/quantized")
        place = next(node for node in readers(value) if node.outputs[0] is quantized)
        return add_node_after(place, "DequantizeLinear", [quantized, *parameters], f"{name}/dequantized")

    def quantize(self, before: ir.Node, value: ir.Value, codes: Affine, bits: int, name: str) -> Coded:
        """Put codes in front of the one node that reads them."""
        stem = f"{name}/{bits}bit"
        parameters = self.parameters(stem, codes, bits)
        quantized = add_node(before, "QuantizeLinear", [value, *parameters], f"{stem}/quantized")
        return Coded(add_node(before, "DequantizeLinear", [quantized, *parameters], f"{stem}/dequantized"), codes, bits)

    def parameters(self, name: str, codes: Affine, bits: int) -> list[ir.Value]:
        """Store a scale and a zero point once."""
        made = []
        for kind, array in (
            ("scale", np.array(codes.scale, np.float32)),
            ("zero_point", np.array(codes.zero_point, self.dtypes[bits])),
        ):
            known = self.graph.initializers.get(f"{name}/{kind}")
            made.append(known if known is not None else add_constant(self.graph, f"{name}/{kind}", array))
        return made

    def weight(self, node: ir.Node, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> ir.Value:
        """Store a weight's codes with a scale for each output channel."""
        name = str(node.name)
        inputs = [
            add_constant(self.graph, f"{name}/weight/codes", codes),
            add_constant(self.graph, f"{name}/weight/scale", scales),
            add_constant(self.graph, f"{name}/weight/zero_point", np.zeros(scales.shape, np.int8)),
        ]
        return add_node(node, "DequantizeLinear", inputs, f"{name}/weight", {"axis": 1})

    def constant(self, value: ir.Value, array: NDArray[np.float32], node: ir.Node) -> ir.Value:
        """Store a constant operand in 16 bits."""
        return self.table(f"{node.name}/{value.name}", array, 16, node).value

    def table(self, name: str, array: NDArray[np.float32], bits: int, node: ir.Node) -> Coded:
        """Store a constant that a node reads."""
        codes = self.cover(float(array.min()), float(array.max()), bits)
        stored = add_constant(self.graph, f"{name}/codes", affine.quantize(array, codes).astype(self.dtypes[bits]))
        inputs = [stored, *self.parameters(name, codes, bits)]
        return Coded(add_node(node, "DequantizeLinear", inputs, f"{name}/dequantized"), codes, bits)


def finished(model: ir.Model) -> onnx.ModelProto:
    """Give a model whose tensors were all coded, sorted and checked; shapes are inferred anew."""
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    for value in (value for node in model.graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    model.ir_version = LOWEST_IR_VERSION
    return checked(model)


def symmetric(largest: float, bits: int) -> Affine:
    """Give codes without a zero point that hold -largest .. largest."""
    limit = 2 ** (bits - 1) - 1
    return Affine(float(np.float32(max(largest, 1e-12) / limit)), 0, -limit - 1, limit)
