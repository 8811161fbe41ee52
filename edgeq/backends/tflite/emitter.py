"""Write the operators of one signature: which tensors hold the codes of which values, and the few writers all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite.writer import DTYPES, Codes, SubgraphWriter, Tensor
from edgeq.errors import LoweringFailed
from edgeq.graph.edit import constant, made_by, readers

OPERATOR = schema.BuiltinOperator
OPTIONS = schema.BuiltinOptions
INT16_CODES = np.arange(-(2**15), 2**15)


@dataclass(frozen=True)
class Settings:
    """Hold what runtimes differ in: the `[runtime]` table of a target."""

    bias_bits: int  # of products that read 16 bits: 32 on LiteRT and tflite-runtime, 64 for the reference kernels
    upcast: str  # "quantize" or "cast": how 8 bits become 16; tflite-runtime 2.14 has no QUANTIZE for it
    lookup: str  # "none", "roots" or "all": which 16-bit RSQRT and GELU are tables; tflite-runtime 2.14 has neither
    rows: str = (
        "mul"  # "mul" or "depthwise": how a tensor is multiplied by a stored row; Ethos-U55 reads MUL's row anew
    )


class Emitter:
    """Hold one subgraph while it is written: batch 1, a fixed number of tokens."""

    def __init__(self, graph: ir.Graph, out: SubgraphWriter, length: int, longest: int, settings: Settings) -> None:
        """Begin with the two inputs."""
        self.graph = graph
        self.out = out
        self.length = length
        self.longest = longest
        self.settings = settings
        self.tensors: dict[ir.Value, Tensor] = {}
        self.adjoint: set[ir.Value] = set()  # tensors written with their last two axes exchanged
        self.wide: dict[int, Tensor] = {}  # by a tensor's index: the same codes in 32 bits
        self.filled: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # tensors of one number
        self.ids = out.input("input_ids", (1, length), "int32")
        self.mask = out.input("attention_mask", (1, length), "int32")
        self.narrow_mask: Tensor | None = None  # in 8 bits, once it is needed

    def read(self, value: ir.Value | None) -> Tensor:
        """Give the tensor whose codes a DequantizeLinear reads."""
        node = made_by(value, "DequantizeLinear")
        if node is None or node.inputs[0] is None:
            raise LoweringFailed(f"{value.name if value else None}: is float where codes are needed")
        codes = node.inputs[0]
        stored = constant(codes)
        if stored is None:
            if codes not in self.tensors:
                raise LoweringFailed(f"{codes.name}: no operator has written it")
            return self.tensors[codes]
        return self.out.constant(str(codes.name), stored, self.codes(node))

    def codes(self, node: ir.Node) -> Codes:
        """Copy the parameters of a QuantizeLinear or DequantizeLinear."""
        scale = constant(node.inputs[1])
        zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None:
            raise LoweringFailed(f"{node.name}: its scale is no constant")
        zeros = np.zeros(scale.shape, np.int64) if zero_point is None else zero_point
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes and scale.ndim else 0
        return Codes(tuple(map(float, scale.reshape(-1))), tuple(map(int, zeros.reshape(-1))), axis)

    def quantizer(self, value: ir.Value) -> ir.Node:
        """Find the QuantizeLinear behind an operator's float result."""
        following = readers(value)
        if len(following) != 1 or following[0].op_type != "QuantizeLinear":
            raise LoweringFailed(f"{value.name}: no codes stand behind it")
        return following[0]

    def write(
        self,
        value: ir.Value,
        shape: Sequence[int],
        builtin: int,
        version: int,
        inputs: Sequence[Tensor],
        options: tuple[int, Any] | None = None,
    ) -> Tensor:
        """Write the operator that makes a float result, with the codes behind it."""
        quantizer = self.quantizer(value)
        result = self.result(quantizer, shape)
        return self.out.operator(builtin, version, inputs, result, options)

    def result(self, quantizer: ir.Node, shape: Sequence[int]) -> Tensor:
        """Make the tensor that a QuantizeLinear's codes lie in."""
        zero_point = constant(quantizer.inputs[2])
        if zero_point is None:
            raise LoweringFailed(f"{quantizer.name}: has no zero point, so no dtype")
        output = quantizer.outputs[0]
        name = str(output.name).removesuffix("/quantized")
        self.tensors[output] = self.out.tensor(name, shape, str(zero_point.dtype), self.codes(quantizer))
        return self.tensors[output]

    def requantized(self, source: Tensor, result: Tensor) -> None:
        """Write the change from one tensor's scale and zero point to another's."""
        options = (OPTIONS.QuantizeOptions, schema.QuantizeOptionsT())
        self.out.operator(OPERATOR.QUANTIZE, 1, [source], result, options)

    def cast(self, source: Tensor, result: Tensor) -> None:
        """Write a change of dtype that keeps the codes."""
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = DTYPES[source.dtype], DTYPES[result.dtype]
        self.out.operator(OPERATOR.CAST, 1, [source], result, (OPTIONS.CastOptions, options))

    def reshaped(self, source: Tensor, shape: Sequence[int], name: str) -> Tensor:
        """Write the same codes in another shape."""
        return self.copied(source, self.out.tensor(name, shape, source.dtype, source.codes))

    def copied(self, source: Tensor, result: Tensor) -> Tensor:
        """Write the same codes, in the result's shape and with its parameters."""
        shape = result.shape
        wanted = np.array(shape, np.int32)
        stored = self.out.constant("shape_" + "_".join(map(str, shape)), wanted)
        options = schema.ReshapeOptionsT()
        options.newShape = wanted
        return self.out.operator(OPERATOR.RESHAPE, 1, [source, stored], result, (OPTIONS.ReshapeOptions, options))

    def step(self, tensor: Tensor) -> float:
        """Give the one scale of a tensor's codes."""
        if tensor.codes is None or len(tensor.codes.scales) != 1:
            raise LoweringFailed(f"{self.out.name}: a tensor of a table has no scale")
        return tensor.codes.scales[0]

    def result_step(self, value: ir.Value) -> float:
        """Give the scale of the codes behind an operator's float result."""
        return self.codes(self.quantizer(value)).scales[0]

    def looked_up(self, value: ir.Value, source: Tensor, entries: NDArray[np.float64]) -> None:
        """Compute a function of a 16-bit tensor by a table of all its codes, or of those that are not negative."""
        quantizer = self.quantizer(value)
        codes = self.codes(quantizer)
        name = str(quantizer.outputs[0].name).removesuffix("/quantized")
        table = np.clip(np.rint(entries), INT16_CODES[0], INT16_CODES[-1]).astype(np.int16)
        stored = self.out.constant(f"{name}/table", table, codes)
        index = self.out.tensor(f"{name}/index", source.shape, "int32")
        self.cast(source, index)
        if len(table) == len(INT16_CODES):
            offset = self.out.constant("table_offset", np.array([-INT16_CODES[0]], np.int32))
            shifted = self.out.tensor(f"{name}/shifted", source.shape, "int32")
            add = schema.AddOptionsT()
            add.potScaleInt16 = False
            index = self.out.operator(OPERATOR.ADD, 1, [index, offset], shifted, (OPTIONS.AddOptions, add))
        gather = (OPTIONS.GatherOptions, schema.GatherOptionsT())
        self.out.operator(OPERATOR.GATHER, 2, [stored, index], self.result(quantizer, source.shape), gather)
