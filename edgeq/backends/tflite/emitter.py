"""Write one signature: map quantised ONNX values to TFLite tensors, with the writers that all operators share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite.sessions import RAW_PIXELS
from edgeq.backends.tflite.writer import DTYPES, QuantParams, SubgraphWriter, Tensor
from edgeq.data.batches import PIXELS
from edgeq.errors import LoweringFailed
from edgeq.graph.edit import constant, dims, made_by, readers

OPERATOR = schema.BuiltinOperator
OPTIONS = schema.BuiltinOptions
INT16_VALUES = np.arange(-(2**15), 2**15)


@dataclass(frozen=True)
class Settings:
    """Hold how operators are written where runtimes differ: the `[runtime]` table of a target."""

    bias_bits: int  # of FULLY_CONNECTED with int16 inputs: 32 is fast, 64 is what versions below 11 mean
    upcast: str  # "quantize" or "cast": the operator from int8 to int16; tflite-runtime 2.14 has no QUANTIZE for it
    lookup: str  # "none", "roots" or "all": whether int16 RSQRT and GELU are tables; tflite-runtime 2.14 has neither
    rows: str = "mul"  # "mul" or "depthwise": the operator that multiplies by a constant row; Ethos-U55 rereads MUL's
    is_bias_stated: bool = True  # FULLY_CONNECTED 11 names its bias's dtype; tflite-runtime 2.14 has no such version


class Emitter:
    """Collect the tensors and operators of one signature: batch 1, a fixed number of tokens."""

    def __init__(self, graph: ir.Graph, out: SubgraphWriter, length: int, longest: int, settings: Settings) -> None:
        """Add the inputs, the two of a text or the pixels of an image, to an empty subgraph.

        Args:
            graph: the integer-only QDQ model's.
            out: the subgraph.
            length: of this signature, in tokens; of images the most that attend to one another.
            longest: signature of the file, in tokens.
            settings: of the runtime.
        """
        self.graph = graph
        self.out = out
        self.length = length
        self.longest = longest
        self.settings = settings
        self.tensors: dict[ir.Value, Tensor] = {}
        self.adjoint: set[ir.Value] = set()  # quantised tensors written with their last two axes exchanged
        self.wide: dict[int, Tensor] = {}  # by a tensor's index: the same integers as int32
        self.exact: dict[ir.Value, Tensor] = {}  # scores with their mask, int32
        self.mask_rows: dict[ir.Value, Tensor] = {}  # what is added to them, int32, by the float mask
        self.totals: dict[ir.Value, tuple[Tensor, float]] = {}  # int32 sums before they are rounded, and their step
        self.differences: dict[ir.Value, tuple[Tensor, float]] = {}  # exact int32 codes that are not stored, their step
        self.filled: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # int32 tensors filled with one number
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.pixels: Tensor | None = None
        self.sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("input_ids", "attention_mask"), (1, length))
        image = next((value for value in graph.inputs if value.name == PIXELS), None)
        if image is None:
            self.ids = out.input("input_ids", (1, length), "int32")
            self.mask = out.input("attention_mask", (1, length), "int32")
        else:
            _, colours, rows, columns = (size if isinstance(size, int) else 1 for size in dims(image) or ())
            self.sizes = {PIXELS: (1, colours, rows, columns)}
            self.pixels = out.input(RAW_PIXELS, (1, rows, columns, colours), "uint8", QuantParams.of(1.0))
        self.narrow_mask: Tensor | None = None  # the mask as int8, once it was written

    def token_mask(self) -> Tensor:
        """Give the attention mask, int32[1, length].

        Raises:
            LoweringFailed: the signature takes an image.
        """
        if self.mask is None:
            raise LoweringFailed(f"{self.out.name}: there is no attention mask")
        return self.mask

    def read(self, value: ir.Value | None) -> Tensor:
        """Give the quantised tensor behind a DequantizeLinear: written by an operator, or stored."""
        node = made_by(value, "DequantizeLinear")
        if node is None or node.inputs[0] is None:
            raise LoweringFailed(f"{value.name if value else None}: is float where codes are needed")
        quantized = node.inputs[0]
        stored = constant(quantized)
        if stored is None:
            if quantized not in self.tensors:
                raise LoweringFailed(f"{quantized.name}: no operator has written it")
            return self.tensors[quantized]
        return self.out.constant(str(quantized.name), stored, self.params(node))

    def params(self, node: ir.Node) -> QuantParams:
        """Copy scales, zero points and axis of a QuantizeLinear or DequantizeLinear."""
        scale = constant(node.inputs[1])
        zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None:
            raise LoweringFailed(f"{node.name}: its scale is no constant")
        zeros = np.zeros(scale.shape, np.int64) if zero_point is None else zero_point
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes and scale.ndim else 0
        return QuantParams(tuple(map(float, scale.reshape(-1))), tuple(map(int, zeros.reshape(-1))), axis)

    def quantizer(self, value: ir.Value) -> ir.Node:
        """Find the QuantizeLinear behind an operator's float result."""
        following = [use for use in readers(value) if use.op_type == "QuantizeLinear"]
        if len(following) != 1:
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
        """Write the operator for a float value, with the parameters of the QuantizeLinear behind the value."""
        quantizer = self.quantizer(value)
        result = self.result(quantizer, shape)
        return self.out.operator(builtin, version, inputs, result, options)

    def result(self, quantizer: ir.Node, shape: Sequence[int]) -> Tensor:
        """Add the tensor for the output of a QuantizeLinear."""
        zero_point = constant(quantizer.inputs[2])
        if zero_point is None:
            raise LoweringFailed(f"{quantizer.name}: has no zero point, so no dtype")
        output = quantizer.outputs[0]
        name = str(output.name).removesuffix("/quantized")
        self.tensors[output] = self.out.tensor(name, shape, str(zero_point.dtype), self.params(quantizer))
        return self.tensors[output]

    def requantized(self, source: Tensor, result: Tensor) -> None:
        """Write QUANTIZE from one tensor's scale and zero point to another's."""
        options = (OPTIONS.QuantizeOptions, schema.QuantizeOptionsT())
        self.out.operator(OPERATOR.QUANTIZE, 1, [source], result, options)

    def cast(self, source: Tensor, result: Tensor) -> None:
        """Write CAST: another dtype, the same integers."""
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = DTYPES[source.dtype], DTYPES[result.dtype]
        self.out.operator(OPERATOR.CAST, 1, [source], result, (OPTIONS.CastOptions, options))

    def reshaped(self, source: Tensor, shape: Sequence[int], name: str) -> Tensor:
        """Write RESHAPE to another shape, with the same parameters."""
        return self.copied(source, self.out.tensor(name, shape, source.dtype, source.params))

    def copied(self, source: Tensor, result: Tensor) -> Tensor:
        """Write RESHAPE into a result, whose parameters may differ: the integers stay the same."""
        shape = result.shape
        wanted = np.array(shape, np.int32)
        stored = self.out.constant("shape_" + "_".join(map(str, shape)), wanted)
        options = schema.ReshapeOptionsT()
        options.newShape = wanted
        return self.out.operator(OPERATOR.RESHAPE, 1, [source, stored], result, (OPTIONS.ReshapeOptions, options))

    def step(self, tensor: Tensor) -> float:
        """Give the scale of a tensor quantised per tensor."""
        if tensor.params is None or len(tensor.params.scales) != 1:
            raise LoweringFailed(f"{self.out.name}: a tensor of a table has no scale")
        return tensor.params.scales[0]

    def result_step(self, value: ir.Value) -> float:
        """Give the scale of the QuantizeLinear behind a float value."""
        return self.params(self.quantizer(value)).scales[0]

    def looked_up(self, value: ir.Value, source: Tensor, entries: NDArray[np.float64]) -> None:
        """Write a function of an int16 tensor as CAST and GATHER in a table.

        Args:
            value: the function's float result.
            source: the int16 tensor.
            entries: float64, the result in steps for each of the 65,536 int16 values, or for 0 to 32767 alone.
        """
        quantizer = self.quantizer(value)
        params = self.params(quantizer)
        name = str(quantizer.outputs[0].name).removesuffix("/quantized")
        table = np.clip(np.rint(entries), INT16_VALUES[0], INT16_VALUES[-1]).astype(np.int16)
        stored = self.out.constant(f"{name}/table", table, params)
        index = self.out.tensor(f"{name}/index", source.shape, "int32")
        self.cast(source, index)
        if len(table) == len(INT16_VALUES):
            offset = self.out.constant("table_offset", np.array([-INT16_VALUES[0]], np.int32))
            shifted = self.out.tensor(f"{name}/shifted", source.shape, "int32")
            add = schema.AddOptionsT()
            add.potScaleInt16 = False
            index = self.out.operator(OPERATOR.ADD, 1, [index, offset], shifted, (OPTIONS.AddOptions, add))
        gather = (OPTIONS.GatherOptions, schema.GatherOptionsT())
        self.out.operator(OPERATOR.GATHER, 2, [stored, index], self.result(quantizer, source.shape), gather)
