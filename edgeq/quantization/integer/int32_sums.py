"""Quantise the Add, Mul, Sub and ReduceMean of the residual stream and its norms as int32 sums, rounded once to int16.

int16 times int16 is an exact int32, and so is a sum of such products where all have one scale. Scales are chosen so
that the scale of the rounded result is a power of two times that of the products: a runtime then shifts by bits instead
of multiplying each value by a real factor.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported, UnsupportedRange
from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, constant, is_read_once, made_by, readers, required
from edgeq.graph.roles import Role
from edgeq.quantization import weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.integer.sum_nodes import (
    is_factor,
    is_product_of_rows,
    is_sum,
    is_table,
    is_term,
    largest_gain,
    subtracts,
)
from edgeq.quantization.qdq import HEADROOM, QdqBuilder, QuantizedValue, symmetric

FACTOR_HEADROOM = 2.0  # of 1/sigma over what was observed: a row with a quarter of the variance
NORMALIZED_MOST = 4.0  # at most, of a centred row divided by its length: exactly 1.0, and the length is rounded
LARGEST_SHIFT = 16
_LARGEST = 2.0**31 - 2.0**17  # of a 32-bit sum, less what rounding adds
_INT16 = np.iinfo(np.int16)


class Int32Sums:
    """Write Mul nodes whose int32 products an Add reads without rounding, and round the Add."""

    def __init__(self, builder: QdqBuilder, gemm_bits: int, table_bits: int, promoted: frozenset[str]) -> None:
        """Begin with no product seen.

        Args:
            builder: of the graph.
            gemm_bits: what products with weights read.
            table_bits: of embedding tables.
            promoted: names of products with weights that read 16 bits.
        """
        self._builder = builder
        self._gemm_bits = gemm_bits
        self._table_bits = table_bits
        self._promoted = promoted
        self._exact: set[ir.Value] = set()  # products and sums that are exact in int32
        self._unrounded: dict[ir.Value, int] = {}  # sums whose differences from their mean read more bits: how many
        self._differences: dict[ir.Value, tuple[ir.Value, float]] = {}  # x less a finer mean, exact, and its step

    def takes(self, node: ir.Node) -> bool:
        """Tell whether a node is a sum in int32, or a step on the way to one."""
        if node.op_type == "Gather":
            return is_table(node) and is_read_once(node.outputs[0]) and is_sum(readers(node.outputs[0])[0])
        if node.op_type == "Mul":
            return is_factor(node) or is_product_of_rows(node) or is_term(node, self._builder)
        if node.op_type == "Add":
            return any(value in self._exact for value in node.inputs) or self._is_inner(node)
        return node.op_type in ("ReduceMean", "Sub") and self._centring(node) is not None

    def quantize(self, node: ir.Node) -> None:
        """Quantise the output of a node, or leave it to the sum that reads it."""
        output = node.outputs[0]
        if node.op_type in ("ReduceMean", "Sub"):
            self._centre(node)
        elif node.op_type == "Mul" and is_factor(node):
            return  # its scale follows from the sum's
        elif is_read_once(output) and is_sum(readers(output)[0]):
            self._exact.add(output)
        elif node.op_type == "Add":
            self._sum(node)
        else:
            self._product(node)

    def range_of_sum(self, output: ir.Value) -> Affine:
        """Give int16 parameters that hold a sum, and its distance from its mean where a LayerNormalization reads it."""
        largest = self._builder.largest(output)
        centred = [node.outputs[0] for node in readers(output) if node.op_type == "Sub"]
        return symmetric(max([largest, *map(self._builder.largest, centred)]) * HEADROOM, 16)

    # what LayerNormalization takes from the sum ---------------------------------------------------------------------

    def _centring(self, node: ir.Node) -> QuantizedValue | None:
        """Give x, where a node is the mean of x or x less its mean, if the int16 parameters of x hold both."""
        value = node.inputs[0]
        source = self._builder.quantized.get(value) if value is not None else None
        if source is None or source.bits != 16 or value is None:
            return None
        if node.op_type == "ReduceMean":
            is_centred = all(subtracts(use, value, node.outputs[0]) for use in readers(node.outputs[0]))
        else:
            mean = made_by(node.inputs[1], "ReduceMean")
            is_centred = mean is not None and mean.inputs[0] is source.value
        return source if is_centred and source.params == self.range_of_sum(value) else None

    def _centre(self, node: ir.Node) -> None:
        """Quantise the mean of x or x less its mean; where the mean has a finer step, keep the exact difference, too.

        x less its mean rounded to the step of x has one error in all channels of a token. Products of weights add that
        up, where errors of single channels average out.
        """
        source = self._centring(node)
        if source is None:
            raise Unsupported(f"{node.name}: reads what is no exact sum")
        builder, output = self._builder, node.outputs[0]
        if node.op_type == "ReduceMean":
            step = source.params.scale * 2.0 ** -self._finer_bits(node, source)
            node.replace_input_with(0, source.value)
            builder.store(node, output, Affine(step, 0, _INT16.min, _INT16.max), 16)
            return
        mean, whole = builder.read(node.inputs[1], 16, node), required(node.inputs[0])
        node.replace_input_with(0, source.value)
        if mean.params != source.params:
            difference = add_node(
                node, "Sub", [whole if whole in self._unrounded else source.value, mean.value],
                f"{output.name}/difference", role=Role.INT32_SUM,
            )  # fmt: skip
            self._differences[output] = difference, mean.params.scale
            mean = builder.requantize(mean, source.params, 16, f"{builder.name_of(mean)}/coarse")
        node.replace_input_with(1, mean.value)
        roles.give(node, Role.INT32_SUM)
        builder.store(node, output, source.params, 16)

    def _finer_bits(self, node: ir.Node, source: QuantizedValue) -> int:
        """Give how many bits finer than x its mean is: as many as keep the mean in 16 bits and products in 31."""
        builder = self._builder
        finer: list[float] = []
        for centring in readers(node.outputs[0]):
            for product in filter(is_product_of_rows, readers(centring.outputs[0])):
                inverse = required(required(made_by(product.inputs[1], "Mul")).inputs[0])
                step = source.params.scale * builder.largest(inverse) * FACTOR_HEADROOM / _INT16.max
                finer.append(math.log2(2.0**30 * step / NORMALIZED_MOST))
        if not finer:
            return 0
        finer.append(self._unrounded.get(required(node.inputs[0]), LARGEST_SHIFT))
        finer.append(math.log2(_INT16.max * source.params.scale / (builder.largest(node.outputs[0]) * HEADROOM)))
        return max(0, min(LARGEST_SHIFT, math.floor(min(finer))))

    def _rows_of(self, product: ir.Node) -> tuple[ir.Value, float]:
        """Give the centred rows that a product multiplies by their factors, and their step."""
        centred = required(product.inputs[0])
        if centred in self._differences:
            return self._differences[centred]
        read = self._builder.read(centred, 16, product)
        return read.value, read.params.scale

    # sums and products ----------------------------------------------------------------------------------------------

    def _sum(self, node: ir.Node) -> None:
        output = node.outputs[0]
        result = self.range_of_sum(output)
        terms = list(self._terms(node))
        shift = self._shift(result, terms)
        step = result.scale * 2.0**-shift
        if self._gemm_bits == 16:
            self._unrounded[output] = shift
        for reader, position, value in terms:
            product = made_by(value, "Mul")
            lookup = made_by(value, "Gather") if value in self._exact else None
            if lookup is not None:
                reader.replace_input_with(position, self._rows(lookup, step))
            elif product is not None and is_product_of_rows(product):
                self._write_product(product, step)
            elif product is not None and value in self._exact:
                source = self._builder.read(product.inputs[0], self._bits(product.inputs[0]), product)
                product.replace_input_with(0, source.value)
                product.replace_input_with(1, self._multiplier(product, constant(product.inputs[1]), source, step))
                roles.give(product, Role.INT32_SUM)
            else:
                source = self._builder.read(value, self._bits(value), reader)
                factor = self._multiplier(reader, np.ones(1, np.float32), source, step)
                term = add_node(reader, "Mul", [source.value, factor], f"{value.name}/term", role=Role.INT32_SUM)
                reader.replace_input_with(position, term)
        self._builder.store(node, output, result, 16)

    def _terms(self, node: ir.Node) -> list[tuple[ir.Node, int, ir.Value]]:
        """List what the Adds of a sum add: the Add, the place of the operand, the operand."""
        roles.give(node, Role.INT32_SUM)
        found = []
        for position, value in enumerate(node.inputs):
            if value is None:
                raise Unsupported(f"{node.name}: a sum of one term")
            inner = made_by(value, "Add") if value in self._exact else None
            found += self._terms(inner) if inner is not None else [(node, position, value)]
        return found

    def _shift(self, result: Affine, terms: list[tuple[ir.Node, int, ir.Value]]) -> int:
        """Give by how many bits the sum is shifted: as many as keep the factors in 16 bits and the sum in 32."""
        shift, largest = LARGEST_SHIFT, 0.0
        fixed = 0.0  # what int16 products add up to at most, whatever the scale
        for _, _, value in terms:
            product = made_by(value, "Mul")
            lookup = made_by(value, "Gather") if value in self._exact else None
            if lookup is not None:
                limit = float(np.abs(constant(lookup.inputs[0])).max())  # type: ignore[arg-type]
                largest += limit
                shift = min(shift, math.floor(math.log2(_INT16.max * result.scale / (limit / 127.0))))
            elif product is not None and is_product_of_rows(product):
                smallest = self._largest_factor(product) / _INT16.max  # scale of the factor
                shift = min(shift, math.floor(math.log2(result.scale / (self._rows_of(product)[1] * smallest))))
                if product.inputs[0] in self._differences:
                    largest += NORMALIZED_MOST * largest_gain(product)
                else:
                    fixed += 2.0**30
            else:
                is_scaled = product is not None and value in self._exact
                source = product.inputs[0] if is_scaled and product is not None else value
                factor = np.abs(constant(product.inputs[1])).max() if is_scaled and product is not None else 1.0  # type: ignore[arg-type]
                params = self._builder.home(source, terms[0][0]).params
                largest += params.scale * -params.low * float(factor)
        while shift > 0 and fixed + largest / result.scale * 2.0**shift > _LARGEST:
            shift -= 1
        if shift < 1:
            raise UnsupportedRange(f"{terms[0][0].name}: its terms differ too much in size for a 32-bit sum")
        return shift

    def _product(self, node: ir.Node) -> None:
        """Quantise rows times their factors that no sum reads: the input of weight products, or of pooling."""
        output = node.outputs[0]
        bits = self._gemm_bits if all(map(self._is_at_gemm_bits, readers(output))) else 16
        headroom = HEADROOM if bits == 16 else 1.0
        result = symmetric(self._builder.largest(output) * headroom, bits)
        smallest = self._largest_factor(node) / _INT16.max
        shift = math.floor(math.log2(result.scale / (self._rows_of(node)[1] * smallest)))
        if shift < 1:
            raise UnsupportedRange(f"{node.name}: its factors are too large for its range")
        self._write_product(node, result.scale * 2.0**-shift)
        self._builder.store(node, output, result, bits)

    def _write_product(self, node: ir.Node, step: float) -> None:
        """Quantise the factors of rows to int16 so that the int32 products have the given scale."""
        centred, centred_step = self._rows_of(node)
        factor = made_by(node.inputs[1], "Mul")
        if factor is None:
            raise Unsupported(f"{node.name}: is no product of rows")
        inverse = self._builder.read(factor.inputs[0], 16, factor)
        gain = constant(factor.inputs[1])
        factor.replace_input_with(0, inverse.value)
        factor.replace_input_with(1, self._gain(factor, gain))  # type: ignore[arg-type]
        params = Affine(float(np.float32(step / centred_step)), 0, _INT16.min, _INT16.max)
        written = self._builder.store(factor, factor.outputs[0], params, 16)
        node.replace_input_with(0, centred)
        node.replace_input_with(1, written.value)
        roles.give(node, Role.INT32_SUM)

    def _rows(self, lookup: ir.Node, step: float) -> ir.Value:
        """Look up an int8 row and its own int16 multiplier, so that no row decides over the scale of the others."""
        table = constant(lookup.inputs[0])
        if table is None:
            raise Unsupported(f"{lookup.name}: looks up in no table")
        values, scales = weight_rounding.nearest(table.T, self._table_bits)
        multipliers = np.rint(scales.astype(np.float64) / step).astype(np.int16)
        name, stem = str(lookup.inputs[0].name), str(lookup.outputs[0].name)  # type: ignore[union-attr]
        lookup.replace_input_with(0, add_constant(self._builder.graph, f"{name}/codes", np.ascontiguousarray(values.T)))
        lookup.name = lookup.outputs[0].name = f"{stem}/codes"
        lookup.outputs[0].dtype = ir.DataType.INT8
        factors = add_constant(self._builder.graph, f"{name}/multipliers", multipliers[:, None])
        before = readers(lookup.outputs[0])[0]
        found = add_node(before, "Gather", [factors, lookup.inputs[1]], f"{stem}/multipliers")  # type: ignore[list-item]
        found.dtype = ir.DataType.INT16
        operands = []
        for looked_up, params, bits in (
            (lookup.outputs[0], Affine(1.0, 0, -128, 127), 8),
            (found, Affine(step, 0, 0, 0), 16),
        ):
            parameters = self._builder.parameters(str(looked_up.name), params, bits)
            operands.append(
                add_node(before, "DequantizeLinear", [looked_up, *parameters], f"{looked_up.name}/dequantized")
            )
        return add_node(before, "Mul", operands, stem, role=Role.INT32_SUM)

    def _largest_factor(self, product: ir.Node) -> float:
        factor = made_by(product.inputs[1], "Mul")
        if factor is None or factor.inputs[0] is None:
            raise Unsupported(f"{product.name}: is no product of rows")
        inverse = self._builder.home(factor.inputs[0], factor)
        seen = self._builder.statistics(self._builder.name_of(inverse))
        largest = min(float(seen.maximum.max()) * FACTOR_HEADROOM, inverse.params.scale * _INT16.max)
        return largest * largest_gain(product)

    def _gain(self, node: ir.Node, gain: np.ndarray) -> ir.Value:
        """Store a gain as int8 weights of 127 or -127 with a scale for each channel."""
        scales = np.maximum(np.abs(gain.reshape(-1)).astype(np.float64), 1e-12) / 127.0
        values = (np.sign(gain.reshape(-1)) * 127).astype(np.int8)
        inputs = [
            add_constant(self._builder.graph, f"{node.name}/gain/codes", values),
            add_constant(self._builder.graph, f"{node.name}/gain/scale", scales.astype(np.float32)),
            add_constant(self._builder.graph, f"{node.name}/gain/zero_point", np.zeros(values.shape, np.int8)),
        ]
        return add_node(node, "DequantizeLinear", inputs, f"{node.name}/gain", {"axis": 0})

    def _multiplier(self, node: ir.Node, factor: np.ndarray | None, source: QuantizedValue, step: float) -> ir.Value:
        """Store the int32 factor that takes a tensor's integers to the scale of the sum."""
        if factor is None:
            raise Unsupported(f"{node.name}: a factor is no constant")
        values = np.rint(factor.astype(np.float64) * source.params.scale / step).astype(np.int32)
        name = f"{self._builder.name_of(source)}/multiplier"
        inputs = [
            add_constant(self._builder.graph, f"{name}/codes", values),
            add_constant(self._builder.graph, f"{name}/scale", np.array(step / source.params.scale, np.float32)),
        ]
        return add_node(node, "DequantizeLinear", inputs, name)

    def _bits(self, value: ir.Value | None) -> int:
        """Give in how many bits a term is read: those it was stored in, if it has no zero point."""
        if value is None or value not in self._builder.quantized:
            raise Unsupported(f"{value.name if value is not None else None}: has no integer form")
        source = self._builder.quantized[value]
        return source.bits if source.params.zero_point == 0 else 16

    def _is_at_gemm_bits(self, node: ir.Node) -> bool:
        """Tell whether a node is a MatMul with weights that was not promoted."""
        return node.op_type == "MatMul" and constant(node.inputs[1]) is not None and node.name not in self._promoted

    def _is_inner(self, node: ir.Node) -> bool:
        """Tell whether an Add of two quantised tensors is a term of an int32 sum."""
        output = node.outputs[0]
        if not is_read_once(output) or not is_sum(readers(output)[0]):
            return False
        return any(value in self._exact for value in readers(output)[0].inputs)
