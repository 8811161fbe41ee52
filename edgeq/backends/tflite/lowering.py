"""Walk an integer-only QDQ model and write each of its operators as one or a few of TFLite's, copying every scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edgeq.backends.tflite.writer import DTYPES, Codes, ModelWriter, SubgraphWriter, Tensor
from edgeq.errors import LoweringFailed
from edgeq.passes.graph import constant, is_read_once, made_by, readers

SIGNATURE = "seq_{}"
_CODES = np.arange(-(2**15), 2**15)  # of 16 bits
_OPERATOR = schema.BuiltinOperator
_OPTIONS = schema.BuiltinOptions
_ADD_LIMIT = 2.0**14  # 16-bit sums: an input's scale over the output's, above which the kernel aborts


@dataclass(frozen=True)
class Settings:
    """Hold what runtimes differ in: the `[runtime]` table of a target."""

    bias_bits: int  # of products that read 16 bits: 32 on LiteRT and tflite-runtime, 64 for the reference kernels
    upcast: str  # "quantize" or "cast": how 8 bits become 16; tflite-runtime 2.14 has no QUANTIZE for it
    lookup: str  # "none", "roots" or "all": which 16-bit RSQRT and GELU are tables; tflite-runtime 2.14 has neither


def lower_model(graph_model: ir.Model, buckets: Sequence[int], settings: Settings) -> bytes:
    """Give the .tflite file with one signature for each sequence length, the largest first.

    Args:
        graph_model: the integer-only QDQ model with symbolic shapes.
        buckets: sequence lengths in tokens.
        settings: of the runtime.

    Raises:
        LoweringFailed: an operator has no TFLite form, or its scales leave what the kernel takes.
    """
    writer = ModelWriter("edgeq")
    for length in sorted(buckets, reverse=True):
        _Lowering(graph_model.graph, writer.subgraph(SIGNATURE.format(length)), length, max(buckets), settings).run()
    return writer.to_bytes()


class _Lowering:
    """Write one subgraph: batch 1, a fixed number of tokens."""

    def __init__(self, graph: ir.Graph, out: SubgraphWriter, length: int, longest: int, settings: Settings) -> None:
        self._graph = graph
        self._out = out
        self._length = length
        self._longest = longest
        self._settings = settings
        self._tensors: dict[ir.Value, Tensor] = {}
        self._adjoint: set[ir.Value] = set()  # tensors written with their last two axes exchanged
        self._mask: Tensor | None = None
        self._ids: Tensor | None = None
        self._writers: dict[str, Callable[[ir.Node], None]] = {
            "Add": self._sum_or_product, "Gather": self._gather, "Gelu": self._gelu, "MatMul": self._matmul,
            "Mul": self._elementwise, "QuantizeLinear": self._quantize, "ReduceMean": self._mean,
            "ReduceSumSquare": self._squares, "Relu": self._relu, "Reshape": self._reshape, "Softmax": self._softmax,
            "Slice": self._slice, "Sqrt": self._inverse_root, "Squeeze": self._reshape, "Sub": self._elementwise,
            "Tanh": self._tanh, "Transpose": self._transpose,
        }  # fmt: skip

    def run(self) -> None:
        """Write everything."""
        self._ids = self._out.input("input_ids", (1, self._length), "int32")
        self._mask = self._out.input("attention_mask", (1, self._length), "int32")
        for node in self._graph:
            if node.op_type in self._writers:
                self._writers[node.op_type](node)
            elif node.op_type not in _NOTHING_TO_WRITE:
                raise LoweringFailed(f"{node.name}: {node.op_type} has no TFLite form")
        output = self._graph.outputs[0]
        self._out.output(str(output.name), self._read(output))

    # reading ------------------------------------------------------------------------------------------------------

    def _read(self, value: ir.Value | None) -> Tensor:
        """Give the tensor whose codes a DequantizeLinear reads."""
        node = made_by(value, "DequantizeLinear")
        if node is None or node.inputs[0] is None:
            raise LoweringFailed(f"{value.name if value else None}: is float where codes are needed")
        codes = node.inputs[0]
        stored = constant(codes)
        if stored is None:
            if codes not in self._tensors:
                raise LoweringFailed(f"{codes.name}: no operator has written it")
            return self._tensors[codes]
        return self._out.constant(str(codes.name), stored, self._codes(node))

    def _codes(self, node: ir.Node) -> Codes:
        """Copy the parameters of a QuantizeLinear or DequantizeLinear."""
        scale = constant(node.inputs[1])
        zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None:
            raise LoweringFailed(f"{node.name}: its scale is no constant")
        zeros = np.zeros(scale.shape, np.int64) if zero_point is None else zero_point
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes and scale.ndim else 0
        return Codes(tuple(map(float, scale.reshape(-1))), tuple(map(int, zeros.reshape(-1))), axis)

    def _quantizer(self, value: ir.Value) -> ir.Node:
        """Find the QuantizeLinear behind an operator's float result."""
        following = readers(value)
        if len(following) != 1 or following[0].op_type != "QuantizeLinear":
            raise LoweringFailed(f"{value.name}: no codes stand behind it")
        return following[0]

    def _write(
        self,
        value: ir.Value,
        shape: Sequence[int],
        builtin: int,
        version: int,
        inputs: Sequence[Tensor],
        options: tuple[int, Any] | None = None,
    ) -> Tensor:
        """Write the operator that makes a float result, with the codes behind it."""
        quantizer = self._quantizer(value)
        result = self._result(quantizer, shape)
        return self._out.operator(builtin, version, inputs, result, options)

    def _result(self, quantizer: ir.Node, shape: Sequence[int]) -> Tensor:
        zero_point = constant(quantizer.inputs[2])
        if zero_point is None:
            raise LoweringFailed(f"{quantizer.name}: has no zero point, so no dtype")
        output = quantizer.outputs[0]
        name = str(output.name).removesuffix("/quantized")
        self._tensors[output] = self._out.tensor(name, shape, str(zero_point.dtype), self._codes(quantizer))
        return self._tensors[output]

    # operators ----------------------------------------------------------------------------------------------------

    def _gather(self, node: ir.Node) -> None:
        table = constant(node.inputs[0])
        dequantizer = next((use for use in readers(node.outputs[0]) if use.op_type == "DequantizeLinear"), None)
        if table is None or table.dtype == np.int64 or dequantizer is None or self._ids is None:
            return  # sizes
        codes = self._codes(dequantizer)
        stored = self._out.constant(str(node.inputs[0].name), table, codes)  # type: ignore[union-attr]
        result = self._out.tensor(str(node.outputs[0].name), (1, self._length, table.shape[1]), str(table.dtype), codes)
        options = schema.GatherOptionsT()
        self._out.operator(_OPERATOR.GATHER, 2, [stored, self._ids], result, (_OPTIONS.GatherOptions, options))
        self._tensors[node.outputs[0]] = result

    def _slice(self, node: ir.Node) -> None:
        """Positions are the first rows of their table: the longest signature's rows, gathered in shorter ones."""
        table = constant(node.inputs[0])
        dequantizer = next((use for use in readers(node.outputs[0]) if use.op_type == "DequantizeLinear"), None)
        if made_by(node.inputs[0], "DequantizeLinear") is not None:
            self._first_row(node)
            return
        if table is None or dequantizer is None or table.ndim != 3:
            raise LoweringFailed(f"{node.name}: slices something else than a table of positions")
        name, codes = str(node.outputs[0].name), self._codes(dequantizer)
        if self._length == self._longest:
            self._tensors[node.outputs[0]] = self._out.constant(name, table[:, : self._length], codes)
            return
        rows = self._out.constant(f"{name}/table", table[0, : self._longest], codes)
        numbers = self._out.constant("positions", np.arange(self._length, dtype=np.int32)[None])
        result = self._out.tensor(name, (1, self._length, table.shape[2]), str(table.dtype), codes)
        gather = (_OPTIONS.GatherOptions, schema.GatherOptionsT())
        self._tensors[node.outputs[0]] = self._out.operator(_OPERATOR.GATHER, 2, [rows, numbers], result, gather)

    def _first_row(self, node: ir.Node) -> None:
        """Gather the first token."""
        bounds = [constant(value) for value in node.inputs[1:4]]
        if [bound.tolist() if bound is not None else None for bound in bounds] != [[0], [1], [1]]:
            raise LoweringFailed(f"{node.name}: slices something else than the first token")
        source = self._read(node.inputs[0])
        options = schema.GatherOptionsT()
        options.axis = 1
        first = self._out.constant("first", np.array([0], np.int32))
        shape = (1, 1, source.shape[2])
        self._write(node.outputs[0], shape, _OPERATOR.GATHER, 2, [source, first], (_OPTIONS.GatherOptions, options))

    def _quantize(self, node: ir.Node) -> None:
        """Write what turns codes into other codes; what stands behind an operator was written with it."""
        source = made_by(node.inputs[0], "DequantizeLinear")
        if source is not None:
            self._requantize(node)
        elif node.outputs[0] not in self._tensors:
            self._mask_codes(node)

    def _requantize(self, node: ir.Node) -> None:
        source = self._read(node.inputs[0])
        zero_point = constant(node.inputs[2])
        is_wider = source.dtype == "int8" and zero_point is not None and zero_point.dtype == np.int16
        is_centred = source.codes is not None and source.codes.zero_points == (0,)
        if self._settings.upcast == "cast" and is_wider and is_centred:  # the scale stays, and so does every value
            name = str(node.outputs[0].name).removesuffix("/quantized")
            self._tensors[node.outputs[0]] = self._out.tensor(name, source.shape, "int16", source.codes)
            self._cast(source, self._tensors[node.outputs[0]])
            return
        self._requantized(source, self._result(node, source.shape))

    def _requantized(self, source: Tensor, result: Tensor) -> None:
        options = (_OPTIONS.QuantizeOptions, schema.QuantizeOptionsT())
        self._out.operator(_OPERATOR.QUANTIZE, 1, [source], result, options)

    def _mask_codes(self, node: ir.Node) -> None:
        """Write the attention mask, or each token's share of the mean, in codes."""
        value = node.inputs[0]
        maker = value.producer() if value is not None else None
        if maker is None or self._mask is None:
            raise LoweringFailed(f"{node.name}: quantises an input")
        if maker.op_type == "Div":
            self._shares(node)
            return
        if maker.op_type != "Mul":
            raise LoweringFailed(f"{node.name}: {maker.op_type} is no form of the attention mask")
        codes = self._codes(node)
        name = str(node.outputs[0].name).removesuffix("/quantized")
        if codes.zero_points == (1,):  # 0 becomes -size, 1 becomes 0: the bits of the mask are the codes
            flat = self._out.tensor(f"{name}/flat", (1, self._length), "int8", codes)
            self._cast(self._mask, flat)
            self._tensors[node.outputs[0]] = self._reshaped(flat, (1, 1, 1, self._length), name)
            return
        size = codes.scales[0] * 32767.0
        flat = self._out.tensor(f"{name}/flat", (1, self._length), "int16", Codes.of(float(np.float32(size))))
        self._cast(self._mask, flat)
        shaped = self._reshaped(flat, (1, 1, 1, self._length), f"{name}/shaped")
        result = self._result(node, (1, 1, 1, self._length))
        self._requantized(shaped, result)

    def _shares(self, node: ir.Node) -> None:
        """Count the tokens, look up one over the count, and give each token that much."""
        codes = self._codes(node)
        name = str(node.outputs[0].name).removesuffix("/quantized")
        axis = self._out.constant("axis_1", np.array([1], np.int32))
        options = schema.ReducerOptionsT()
        options.keepDims = False
        count = self._out.tensor(f"{name}/count", (1,), "int32")
        mask = self._mask
        if mask is None:
            raise LoweringFailed(f"{node.name}: there is no attention mask")
        self._out.operator(_OPERATOR.SUM, 1, [mask, axis], count, (_OPTIONS.ReducerOptions, options))
        counts = np.maximum(np.arange(self._length + 1), 1)
        table = np.rint(1.0 / (counts * codes.scales[0])).astype(np.int16)
        stored = self._out.constant(f"{name}/one_over_count", table, codes)
        inverse = self._out.tensor(f"{name}/inverse", (1,), "int16", codes)
        gather = (_OPTIONS.GatherOptions, schema.GatherOptionsT())
        self._out.operator(_OPERATOR.GATHER, 2, [stored, count], inverse, gather)
        ones = self._out.tensor(f"{name}/mask", (1, self._length), "int16", Codes.of(1.0))
        self._cast(mask, ones)
        flat = self._out.tensor(f"{name}/flat", (1, self._length), "int16", codes)
        self._out.operator(_OPERATOR.MUL, 2, [ones, inverse], flat, (_OPTIONS.MulOptions, schema.MulOptionsT()))
        self._tensors[node.outputs[0]] = self._reshaped(flat, (1, 1, self._length), name)

    def _cast(self, source: Tensor, result: Tensor) -> None:
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = DTYPES[source.dtype], DTYPES[result.dtype]
        self._out.operator(_OPERATOR.CAST, 1, [source], result, (_OPTIONS.CastOptions, options))

    def _sum_or_product(self, node: ir.Node) -> None:
        if self._product_of(node) is None:
            self._elementwise(node)

    def _product_of(self, add: ir.Node) -> ir.Node | None:
        """Find the weight product whose bias an Add is; it was written with the product."""
        product = next((made for value in add.inputs if (made := made_by(value, "MatMul")) is not None), None)
        return product if product is not None and is_read_once(product.outputs[0]) else None

    def _elementwise(self, node: ir.Node) -> None:
        if not readers(node.outputs[0]) or any(made_by(value, "DequantizeLinear") is None for value in node.inputs):
            return  # of the mask
        left, right = (self._read(value) for value in node.inputs)
        shape = np.broadcast_shapes(left.shape, right.shape)
        builtin, kind, options = {
            "Add": (_OPERATOR.ADD, _OPTIONS.AddOptions, schema.AddOptionsT),
            "Sub": (_OPERATOR.SUB, _OPTIONS.SubOptions, schema.SubOptionsT),
            "Mul": (_OPERATOR.MUL, _OPTIONS.MulOptions, schema.MulOptionsT),
        }[node.op_type]
        table = options()
        if node.op_type != "Mul":
            table.potScaleInt16 = False
        result = self._write(node.outputs[0], shape, builtin, 2, [left, right], (kind, table))
        if node.op_type != "Mul" and result.dtype == "int16":
            largest = max(left.codes.scales[0], right.codes.scales[0])  # type: ignore[union-attr]
            if largest >= _ADD_LIMIT * result.codes.scales[0]:  # type: ignore[union-attr]
                raise LoweringFailed(f"{node.name}: its operand's scale {largest:g} is too large for its result's")

    def _matmul(self, node: ir.Node) -> None:
        weight = made_by(node.inputs[1], "DequantizeLinear")
        stored = constant(weight.inputs[0]) if weight is not None else None
        if weight is not None and stored is not None:
            self._fully_connected(node, weight, stored)
            return
        left, right = (self._read(value) for value in node.inputs)
        source = made_by(node.inputs[1], "DequantizeLinear")
        is_adjoint = source is not None and source.inputs[0] in self._adjoint
        width = right.shape[-2] if is_adjoint else right.shape[-1]
        self._batch_matmul(node.outputs[0], left, right, (*left.shape[:-1], width), is_adjoint)

    def _batch_matmul(
        self, value: ir.Value, left: Tensor, right: Tensor, shape: Sequence[int], is_adjoint: bool
    ) -> Tensor:
        options = schema.BatchMatMulOptionsT()
        options.adjY = is_adjoint
        version = 3 if left.dtype == "int16" else 2
        return self._write(
            value, shape, _OPERATOR.BATCH_MATMUL, version, [left, right], (_OPTIONS.BatchMatMulOptions, options)
        )

    def _fully_connected(self, node: ir.Node, weight: ir.Node, stored: NDArray[np.int8]) -> None:
        source = self._read(node.inputs[0])
        codes = self._codes(weight)
        name = str(weight.inputs[0].name)  # type: ignore[union-attr]
        # FULLY_CONNECTED takes weights as [out, in], with a scale for each output channel.
        matrix = self._out.constant(name, np.ascontiguousarray(stored.T), replace(codes, axis=0))
        inputs, end = [source, matrix], node
        add = readers(node.outputs[0])[0]
        if add.op_type == "Add" and is_read_once(node.outputs[0]):
            bias = next(made_by(value, "DequantizeLinear") for value in add.inputs if value is not node.outputs[0])
            values = constant(bias.inputs[0]) if bias is not None else None
            if bias is None or values is None:
                raise LoweringFailed(f"{node.name}: its bias is no constant")
            bits = self._settings.bias_bits if source.dtype == "int16" else 32
            dtype = np.int64 if bits == 64 else np.int32
            inputs.append(self._out.constant(str(bias.inputs[0].name), values.astype(dtype), self._codes(bias)))  # type: ignore[union-attr]
            end = add
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims = True
        version = 4 if source.dtype == "int16" else 5
        self._write(
            end.outputs[0], (*source.shape[:-1], stored.shape[1]), _OPERATOR.FULLY_CONNECTED, version, inputs,
            (_OPTIONS.FullyConnectedOptions, options),
        )  # fmt: skip

    def _gelu(self, node: ir.Node) -> None:
        source = self._read(node.inputs[0])
        if source.dtype == "int16" and self._settings.lookup == "all":
            entries = _gelu(_CODES.astype(np.float64) * self._step(source)) / self._result_step(node.outputs[0])
            self._looked_up(node.outputs[0], source, entries)
            return
        options = schema.GeluOptionsT()
        kind = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
        options.approximate = kind == "tanh"
        self._write(node.outputs[0], source.shape, _OPERATOR.GELU, 2, [source], (_OPTIONS.GeluOptions, options))

    def _relu(self, node: ir.Node) -> None:
        source = self._read(node.inputs[0])
        self._write(node.outputs[0], source.shape, _OPERATOR.RELU, 2, [source])

    def _tanh(self, node: ir.Node) -> None:
        source = self._read(node.inputs[0])
        reals = _CODES.astype(np.float64) * self._step(source)
        self._looked_up(node.outputs[0], source, np.tanh(reals) / self._result_step(node.outputs[0]))

    def _softmax(self, node: ir.Node) -> None:
        source = self._read(node.inputs[0])
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        version = 3 if source.dtype == "int16" else 2
        self._write(
            node.outputs[0], source.shape, _OPERATOR.SOFTMAX, version, [source], (_OPTIONS.SoftmaxOptions, options)
        )

    def _mean(self, node: ir.Node) -> None:
        """Take the mean over channels as a product with one column of ones: MEAN takes fifteen times as long."""
        source = self._read(node.inputs[0])
        width = source.shape[-1]
        ones = self._out.constant(
            f"ones_{width}", np.ones((1, width), np.int8), Codes.of(float(np.float32(1.0 / width)))
        )
        options = schema.FullyConnectedOptionsT()
        options.keepNumDims = True
        table = (_OPTIONS.FullyConnectedOptions, options)
        self._write(node.outputs[0], (*source.shape[:-1], 1), _OPERATOR.FULLY_CONNECTED, 4, [source, ones], table)

    def _squares(self, node: ir.Node) -> None:
        """Sum squares as the product of each row with itself: exact in the accumulator, rounded once."""
        source = self._read(node.inputs[0])
        quantizer = self._quantizer(node.outputs[0])
        name = str(quantizer.outputs[0].name).removesuffix("/quantized")
        rows = self._reshaped(source, (*source.shape[:-1], 1, source.shape[-1]), f"{name}/rows")
        sums = self._result(quantizer, (*source.shape[:-1], 1, 1))
        options = schema.BatchMatMulOptionsT()
        options.adjY = True
        self._out.operator(_OPERATOR.BATCH_MATMUL, 3, [rows, rows], sums, (_OPTIONS.BatchMatMulOptions, options))
        self._tensors[quantizer.outputs[0]] = self._reshaped(sums, (*source.shape[:-1], 1), f"{name}/column")

    def _inverse_root(self, node: ir.Node) -> None:
        source = self._read(node.inputs[0])
        inverse = readers(node.outputs[0])[0]
        if self._settings.lookup == "none":
            self._write(inverse.outputs[0], source.shape, _OPERATOR.RSQRT, 1, [source])
            return
        # The operator interpolates a table of every 128th code: it is off where codes are small.
        factor = 1.0 / (math.sqrt(self._step(source)) * self._result_step(inverse.outputs[0]))
        exact = 2.0 ** round(math.log2(factor / _CODES[-1])) * float(_CODES[-1])
        if math.isclose(factor, exact, rel_tol=1e-6):  # but for the rounding of scales to float32
            factor = exact
        codes = np.maximum(_CODES[len(_CODES) // 2 :], 0.5)  # no sum of squares is negative; 0 is half a step at most
        self._looked_up(inverse.outputs[0], source, factor / np.sqrt(codes))

    def _step(self, tensor: Tensor) -> float:
        if tensor.codes is None or len(tensor.codes.scales) != 1:
            raise LoweringFailed(f"{self._out.name}: a tensor of a table has no scale")
        return tensor.codes.scales[0]

    def _result_step(self, value: ir.Value) -> float:
        return self._codes(self._quantizer(value)).scales[0]

    def _looked_up(self, value: ir.Value, source: Tensor, entries: NDArray[np.float64]) -> None:
        """Compute a function of a 16-bit tensor by a table of all its codes, or of those that are not negative."""
        quantizer = self._quantizer(value)
        codes = self._codes(quantizer)
        name = str(quantizer.outputs[0].name).removesuffix("/quantized")
        table = np.clip(np.rint(entries), _CODES[0], _CODES[-1]).astype(np.int16)
        stored = self._out.constant(f"{name}/table", table, codes)
        index = self._out.tensor(f"{name}/index", source.shape, "int32")
        self._cast(source, index)
        if len(table) == len(_CODES):
            offset = self._out.constant("table_offset", np.array([-_CODES[0]], np.int32))
            shifted = self._out.tensor(f"{name}/shifted", source.shape, "int32")
            add = schema.AddOptionsT()
            add.potScaleInt16 = False
            index = self._out.operator(_OPERATOR.ADD, 2, [index, offset], shifted, (_OPTIONS.AddOptions, add))
        gather = (_OPTIONS.GatherOptions, schema.GatherOptionsT())
        self._out.operator(_OPERATOR.GATHER, 2, [stored, index], self._result(quantizer, source.shape), gather)

    def _reshape(self, node: ir.Node) -> None:
        if made_by(node.inputs[0], "DequantizeLinear") is None:
            return  # of the mask
        source = self._read(node.inputs[0])
        if node.op_type == "Squeeze":
            axes = constant(node.inputs[1])
            dropped = {int(axis) % len(source.shape) for axis in axes.reshape(-1)} if axes is not None else set()
            shape = tuple(size for axis, size in enumerate(source.shape) if axis not in dropped)
        else:
            shape = self._target(node, source.shape)
        quantizer = self._quantizer(node.outputs[0])
        name = str(quantizer.outputs[0].name).removesuffix("/quantized")
        self._tensors[quantizer.outputs[0]] = self._reshaped(source, shape, name)

    def _target(self, node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        wanted = constant(node.inputs[1])
        if wanted is None:
            raise LoweringFailed(f"{node.name}: its shape is no constant")
        sizes = [shape[axis] if size == 0 else int(size) for axis, size in enumerate(wanted.tolist())]
        rest = int(np.prod(shape)) // max(1, -int(np.prod(sizes))) if -1 in sizes else 0
        return tuple(rest if size == -1 else size for size in sizes)

    def _reshaped(self, source: Tensor, shape: Sequence[int], name: str) -> Tensor:
        result = self._out.tensor(name, shape, source.dtype, source.codes)
        wanted = np.array(shape, np.int32)
        stored = self._out.constant("shape_" + "_".join(map(str, shape)), wanted)
        options = schema.ReshapeOptionsT()
        options.newShape = wanted
        return self._out.operator(_OPERATOR.RESHAPE, 1, [source, stored], result, (_OPTIONS.ReshapeOptions, options))

    def _transpose(self, node: ir.Node) -> None:
        """Move axes; the right operand of a product is written as the kernel reads it, last two axes exchanged."""
        if made_by(node.inputs[0], "DequantizeLinear") is None:
            return  # of the mask
        source = self._read(node.inputs[0])
        perm = list(node.attributes["perm"].as_ints())
        quantizer = self._quantizer(node.outputs[0])
        if self._is_right_operand(quantizer):
            perm = [*perm[:-2], perm[-1], perm[-2]]
            self._adjoint.add(quantizer.outputs[0])
        result = self._result(quantizer, [source.shape[axis] for axis in perm])
        stored = self._out.constant("perm_" + "_".join(map(str, perm)), np.array(perm, np.int32))
        options = (_OPTIONS.TransposeOptions, schema.TransposeOptionsT())
        self._out.operator(_OPERATOR.TRANSPOSE, 2, [source, stored], result, options)

    def _is_right_operand(self, quantizer: ir.Node) -> bool:
        dequantizers = readers(quantizer.outputs[0])
        uses = [use for item in dequantizers for use in item.outputs[0].uses()]
        return bool(uses) and all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)


def _gelu(reals: NDArray[np.float64]) -> NDArray[np.float64]:
    twice = np.array([1.0 + math.erf(real / math.sqrt(2.0)) for real in reals.tolist()], np.float64)
    product: NDArray[np.float64] = reals * twice / 2.0
    return product


# Read with another node, or preparing the mask and sizes, which lowering writes in its own way.
_NOTHING_TO_WRITE = frozenset(
    "ArgMax Cast Clip Concat DequantizeLinear Div Expand Identity Reciprocal ReduceSum Shape Unsqueeze".split()
)
