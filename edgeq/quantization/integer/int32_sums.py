"""Code sums that are exact in 32 bits and rounded once: the residual stream, and what LayerNormalization makes of it.

16-bit codes times 16-bit codes are an exact 32-bit integer, and so is a sum of such products where all have one step.
Steps are chosen so that the step of the rounded result is a power of two times the step of the products: a runtime
then needs a shift, and no multiplication by a real factor for each value.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, constant, is_read_once, made_by, readers
from edgeq.graph.roles import Role
from edgeq.quantization import weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import HEADROOM, Coded, CodedGraph, symmetric

FACTOR_HEADROOM = 2.0  # of one over the length of a row, over what was observed: a row four times as short
LARGEST_SHIFT = 16
_LARGEST = 2.0**31 - 2.0**17  # of a 32-bit sum, less what rounding adds
_INT16 = np.iinfo(np.int16)


class ExactSums:
    """Leave products without codes where a sum reads them, and code the sum."""

    def __init__(self, codes: CodedGraph, gemm_bits: int, table_bits: int, raised: frozenset[str]) -> None:
        """Begin with no product seen.

        Args:
            codes: of the graph.
            gemm_bits: what products with weights read.
            table_bits: of embedding tables.
            raised: names of products with weights that read 16 bits.
        """
        self._codes = codes
        self._gemm_bits = gemm_bits
        self._table_bits = table_bits
        self._raised = raised
        self._exact: set[ir.Value] = set()  # products and sums that are exact in 32 bits

    def takes(self, node: ir.Node) -> bool:
        """Tell whether a node belongs to an exact sum."""
        if node.op_type == "Gather":
            return _is_table(node) and is_read_once(node.outputs[0]) and _is_sum(readers(node.outputs[0])[0])
        if node.op_type == "Mul":
            return _is_factor(node) or _is_product_of_rows(node) or _is_term(node, self._codes)
        if node.op_type == "Add":
            return any(value in self._exact for value in node.inputs) or self._is_inner(node)
        return node.op_type in ("ReduceMean", "Sub") and self._centring(node) is not None

    def visit(self, node: ir.Node) -> None:
        """Code the output of a node, or leave it to the sum that reads it."""
        output = node.outputs[0]
        if node.op_type in ("ReduceMean", "Sub"):
            self._centre(node)
        elif node.op_type == "Mul" and _is_factor(node):
            return  # its step follows from the sum's
        elif is_read_once(output) and _is_sum(readers(output)[0]):
            self._exact.add(output)
        elif node.op_type == "Add":
            self._sum(node)
        else:
            self._product(node)

    def range_of_sum(self, output: ir.Value) -> Affine:
        """Give 16-bit codes that hold a sum, and its distance from its mean where a LayerNormalization reads it."""
        largest = self._codes.largest(output)
        centred = [node.outputs[0] for node in readers(output) if node.op_type == "Sub"]
        return symmetric(max([largest, *map(self._codes.largest, centred)]) * HEADROOM, 16)

    # what LayerNormalization takes from the sum ---------------------------------------------------------------------

    def _centring(self, node: ir.Node) -> Coded | None:
        """Give the codes of x, for the mean of x or for x less its mean, if x was coded to hold both."""
        value = node.inputs[0]
        coded = self._codes.coded.get(value) if value is not None else None
        if coded is None or coded.bits != 16 or value is None:
            return None
        if node.op_type == "ReduceMean":
            is_centred = all(_subtracts(use, value, node.outputs[0]) for use in readers(node.outputs[0]))
        else:
            mean = made_by(node.inputs[1], "ReduceMean")
            is_centred = mean is not None and mean.inputs[0] is coded.value
        return coded if is_centred and coded.affine == self.range_of_sum(value) else None

    def _centre(self, node: ir.Node) -> None:
        coded = self._centring(node)
        if coded is None:
            raise Unsupported(f"{node.name}: reads what is no exact sum")
        node.replace_input_with(0, coded.value)
        if node.op_type == "Sub":
            node.replace_input_with(1, self._codes.read(node.inputs[1], 16, node).value)
        self._codes.store(node, node.outputs[0], coded.affine, 16)

    # sums and products ----------------------------------------------------------------------------------------------

    def _sum(self, node: ir.Node) -> None:
        output = node.outputs[0]
        result = self.range_of_sum(output)
        terms = list(self._terms(node))
        step = result.scale * 2.0 ** -self._shift(result, terms)
        for reader, position, value in terms:
            product = made_by(value, "Mul")
            lookup = made_by(value, "Gather") if value in self._exact else None
            if lookup is not None:
                reader.replace_input_with(position, self._rows(lookup, step))
            elif product is not None and _is_product_of_rows(product):
                self._code_product(product, step)
            elif product is not None and value in self._exact:
                coded = self._codes.read(product.inputs[0], self._bits(product.inputs[0]), product)
                product.replace_input_with(0, coded.value)
                product.replace_input_with(1, self._multiplier(product, constant(product.inputs[1]), coded, step))
            else:
                coded = self._codes.read(value, self._bits(value), reader)
                factor = self._multiplier(reader, np.ones(1, np.float32), coded, step)
                term = add_node(reader, "Mul", [coded.value, factor], f"{value.name}/term")
                reader.replace_input_with(position, term)
        self._codes.store(node, output, result, 16)

    def _terms(self, node: ir.Node) -> list[tuple[ir.Node, int, ir.Value]]:
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
        fixed = 0.0  # what products of 16-bit codes add up to at most, whatever the step
        for _, _, value in terms:
            product = made_by(value, "Mul")
            lookup = made_by(value, "Gather") if value in self._exact else None
            if lookup is not None:
                limit = float(np.abs(constant(lookup.inputs[0])).max())  # type: ignore[arg-type]
                largest += limit
                shift = min(shift, math.floor(math.log2(_INT16.max * result.scale / (limit / 127.0))))
            elif product is not None and _is_product_of_rows(product):
                centred = self._codes.coded[product.inputs[0]]  # type: ignore[index]
                smallest = self._largest_factor(product) / _INT16.max  # step of the factor
                shift = min(shift, math.floor(math.log2(result.scale / (centred.affine.scale * smallest))))
                fixed += 2.0**30
            else:
                is_scaled = product is not None and value in self._exact
                source = product.inputs[0] if is_scaled and product is not None else value
                factor = np.abs(constant(product.inputs[1])).max() if is_scaled and product is not None else 1.0  # type: ignore[arg-type]
                coded = self._codes.coded[source]  # type: ignore[index]
                largest += coded.affine.scale * -coded.affine.low * float(factor)
        while shift > 0 and fixed + largest / result.scale * 2.0**shift > _LARGEST:
            shift -= 1
        if shift < 1:
            raise Unsupported(f"{terms[0][0].name}: its terms differ too much in size for a 32-bit sum")
        return shift

    def _product(self, node: ir.Node) -> None:
        """Code rows times their factors by themselves: what weights multiply, or pooling reads."""
        output = node.outputs[0]
        bits = self._gemm_bits if all(map(self._is_narrow, readers(output))) else 16
        headroom = HEADROOM if bits == 16 else 1.0
        result = symmetric(self._codes.largest(output) * headroom, bits)
        centred = self._codes.coded[node.inputs[0]]  # type: ignore[index]
        smallest = self._largest_factor(node) / _INT16.max
        shift = math.floor(math.log2(result.scale / (centred.affine.scale * smallest)))
        if shift < 1:
            raise Unsupported(f"{node.name}: its factors are too large for its range")
        self._code_product(node, result.scale * 2.0**-shift)
        self._codes.store(node, output, result, bits)

    def _code_product(self, node: ir.Node, step: float) -> None:
        """Code the factors of rows so that a product of codes has the given step."""
        centred = self._codes.read(node.inputs[0], 16, node)
        factor = made_by(node.inputs[1], "Mul")
        if factor is None:
            raise Unsupported(f"{node.name}: is no product of rows")
        inverse = self._codes.read(factor.inputs[0], 16, factor)
        gain = constant(factor.inputs[1])
        factor.replace_input_with(0, inverse.value)
        factor.replace_input_with(1, self._gain(factor, gain))  # type: ignore[arg-type]
        codes = Affine(float(np.float32(step / centred.affine.scale)), 0, _INT16.min, _INT16.max)
        self._codes.store(factor, factor.outputs[0], codes, 16)
        node.replace_input_with(0, centred.value)
        node.replace_input_with(1, self._codes.coded[factor.outputs[0]].value)

    def _rows(self, lookup: ir.Node, step: float) -> ir.Value:
        """Look up 8-bit codes of a row, and by how much they are multiplied: no row decides over the others' steps."""
        table = constant(lookup.inputs[0])
        if table is None:
            raise Unsupported(f"{lookup.name}: looks up in no table")
        codes, scales = weight_rounding.nearest(table.T, self._table_bits)
        multipliers = np.rint(scales.astype(np.float64) / step).astype(np.int16)
        name, stem = str(lookup.inputs[0].name), str(lookup.outputs[0].name)  # type: ignore[union-attr]
        lookup.replace_input_with(0, add_constant(self._codes.graph, f"{name}/codes", np.ascontiguousarray(codes.T)))
        lookup.name = lookup.outputs[0].name = f"{stem}/codes"
        lookup.outputs[0].dtype = ir.DataType.INT8
        factors = add_constant(self._codes.graph, f"{name}/multipliers", multipliers[:, None])
        before = readers(lookup.outputs[0])[0]
        found = add_node(before, "Gather", [factors, lookup.inputs[1]], f"{stem}/multipliers")  # type: ignore[list-item]
        found.dtype = ir.DataType.INT16
        operands = []
        for looked_up, codes_of, bits in (
            (lookup.outputs[0], Affine(1.0, 0, -128, 127), 8),
            (found, Affine(step, 0, 0, 0), 16),
        ):
            parameters = self._codes.parameters(str(looked_up.name), codes_of, bits)
            operands.append(
                add_node(before, "DequantizeLinear", [looked_up, *parameters], f"{looked_up.name}/dequantized")
            )
        return add_node(before, "Mul", operands, stem)

    def _largest_factor(self, product: ir.Node) -> float:
        factor = made_by(product.inputs[1], "Mul")
        if factor is None or factor.inputs[0] is None:
            raise Unsupported(f"{product.name}: is no product of rows")
        gain = constant(factor.inputs[1])
        inverse = self._codes.coded[factor.inputs[0]]
        seen = self._codes.observed[self._codes.name_of(inverse)]
        largest = min(float(seen.maximum.max()) * FACTOR_HEADROOM, inverse.affine.scale * _INT16.max)
        return largest * max(float(np.abs(gain).max()), 1e-12)  # type: ignore[arg-type]

    def _gain(self, node: ir.Node, gain: np.ndarray) -> ir.Value:
        """Store a gain as the weights of a product with one input: one code, and a scale for each channel."""
        scales = np.maximum(np.abs(gain.reshape(-1)).astype(np.float64), 1e-12) / 127.0
        codes = (np.sign(gain.reshape(-1)) * 127).astype(np.int8)
        inputs = [
            add_constant(self._codes.graph, f"{node.name}/gain/codes", codes),
            add_constant(self._codes.graph, f"{node.name}/gain/scale", scales.astype(np.float32)),
            add_constant(self._codes.graph, f"{node.name}/gain/zero_point", np.zeros(codes.shape, np.int8)),
        ]
        return add_node(node, "DequantizeLinear", inputs, f"{node.name}/gain", {"axis": 0})

    def _multiplier(self, node: ir.Node, factor: np.ndarray | None, coded: Coded, step: float) -> ir.Value:
        """Store by how much codes are multiplied to have the step of the sum: 32-bit integers."""
        if factor is None:
            raise Unsupported(f"{node.name}: a factor is no constant")
        codes = np.rint(factor.astype(np.float64) * coded.affine.scale / step).astype(np.int32)
        name = f"{self._codes.name_of(coded)}/multiplier"
        inputs = [
            add_constant(self._codes.graph, f"{name}/codes", codes),
            add_constant(self._codes.graph, f"{name}/scale", np.array(step / coded.affine.scale, np.float32)),
        ]
        return add_node(node, "DequantizeLinear", inputs, name)

    def _bits(self, value: ir.Value | None) -> int:
        """Give in how many bits a term is read: those it has, if its codes are multiples of it."""
        if value not in self._codes.coded:
            raise Unsupported(f"{value.name if value else None}: has no integer form")
        coded = self._codes.coded[value]
        return coded.bits if coded.affine.zero_point == 0 else 16

    def _is_narrow(self, node: ir.Node) -> bool:
        """Tell whether a node is a product with weights that reads no more bits than the scheme says."""
        return node.op_type == "MatMul" and constant(node.inputs[1]) is not None and node.name not in self._raised

    def _is_inner(self, node: ir.Node) -> bool:
        """Tell whether a sum of two coded tensors is a term of an exact sum."""
        output = node.outputs[0]
        if not is_read_once(output) or not _is_sum(readers(output)[0]):
            return False
        return any(value in self._exact for value in readers(output)[0].inputs)


def _is_table(node: ir.Node) -> bool:
    table = constant(node.inputs[0])
    return table is not None and table.dtype == np.float32 and table.ndim == 2


def _is_factor(node: ir.Node) -> bool:
    return roles.has(node, Role.ROW_FACTOR)


def _is_product_of_rows(node: ir.Node) -> bool:
    factor = made_by(node.inputs[1], "Mul")
    return node.op_type == "Mul" and factor is not None and _is_factor(factor)


def _is_sum(node: ir.Node) -> bool:
    return node.op_type == "Add" and all(constant(value) is None for value in node.inputs)


def _is_term(node: ir.Node, codes: CodedGraph) -> bool:
    """A coded tensor times a constant, which a sum alone reads."""
    output, source = node.outputs[0], node.inputs[0]
    is_scaled = constant(node.inputs[1]) is not None and source in codes.coded
    if not is_scaled or source is None or not is_read_once(output) or not _is_sum(readers(output)[0]):
        return False
    return codes.coded[source].affine.zero_point == 0


def _subtracts(node: ir.Node, value: ir.Value, mean: ir.Value) -> bool:
    return node.op_type == "Sub" and node.inputs[0] is value and node.inputs[1] is mean
