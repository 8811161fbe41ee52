"""Turn an equalised float model into an integer-only QDQ model: every tensor has codes, and nothing stays float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, add_node_after, constant, dims, readers
from edgeq.graph.linear import bias_of
from edgeq.graph.roles import Role
from edgeq.quantization import affine, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.integer.attention_mask import Masks
from edgeq.quantization.integer.deferred_softmax import ExactShares
from edgeq.quantization.integer.embedding_rows import is_pooled, scaled_rows
from edgeq.quantization.integer.int32_sums import ExactSums
from edgeq.quantization.output_precision import vector_codes
from edgeq.quantization.qdq import HEADROOM, INTEGER_DTYPES, Coded, CodedGraph, finished, symmetric
from edgeq.quantization.ranges import GELU_FLOOR, MASKED_BELOW
from edgeq.quantization.rewrites.integer import integer_form
from edgeq.quantization.rewrites.npu_operators import ROOT_HEADROOM, Fixed, npu_operators
from edgeq.quantization.rewrites.observe_row_maxima import ROW_MAXIMUM
from edgeq.records import IntegerForm, Scheme

SOFTMAX = {8: Affine(1 / 256, -128, -128, 127), 16: Affine(1 / 32768, 0, -32768, 32767)}
SIGMOID = Affine(1 / 32768, 0, -32768, 32767)
SHARE = Affine(1 / 32767, 0, -32768, 32767)  # of a token in the mean
_STILL = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "ReduceMax"})
_INT16, _INT32 = np.iinfo(np.int16), np.iinfo(np.int32)


def quantize_integer(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme, feeds: Sequence[AnyFeeds] = ()
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """Take norms apart, fold constants, and give every tensor codes.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its primitives.
        scheme: bits of products, attention and the rest.
        feeds: probe batches on which each rewrite is proved.

    Returns:
        The QDQ model, the names of the integer products, and an empty tuple: nothing stays float.

    Raises:
        Unsupported: the graph holds what has no integer form.
        EdgeqError: a tensor has no statistics.
    """
    form = scheme.integer
    if form is None:
        raise EdgeqError(f"{scheme.name} is no integer-only scheme")
    graph_model, seen = integer_form(model, observed, form, feeds)
    graph = graph_model.graph
    fixed = npu_operators(graph, seen, form)
    RemoveUnusedNodesPass()(graph_model)
    TopologicalSortPass()(graph_model)
    coder = _Coder(graph, seen, scheme, form, fixed)
    for node in list(graph):
        coder.visit(node)
    coder.finish()
    return finished(graph_model), coder.products, ()


class _Coder:
    """Walk the graph in order and put QuantizeLinear and DequantizeLinear behind every tensor."""

    def __init__(self, graph: ir.Graph, observed: Observed, scheme: Scheme, form: IntegerForm, fixed: Fixed) -> None:
        # Exact sums take the same codes, by a cast. Without them a step of its own keeps a compiler (Vela) from merging
        # the copy into the product before it, which would no longer saturate.
        self._codes = CodedGraph(graph, observed, 1 if form.sum_bits == 32 else 256)
        self._codes.fixed = fixed
        self._form = form
        self._weight_bits = scheme.weight_bits
        self._wide = frozenset({*scheme.raised, *(str(node.name) for node in graph if self._is_fine(node))})
        self._table_bits = scheme.embedding_bits
        self._masks = Masks(self._codes)
        self._positions: set[ir.Value] = set()  # what follows from the sizes of the inputs alone
        self._shares = ExactShares(self._codes) if form.shares == "exact" else None
        self._sums: ExactSums | None = None
        if form.sum_bits == 32:
            self._sums = ExactSums(self._codes, form.gemm_bits, scheme.embedding_bits, self._wide)
        self._done: set[ir.Node] = set()
        self._products: list[str] = []
        self._visitors: dict[str, Callable[[ir.Node], None]] = {
            "Add": self._add, "Clip": self._rewritten, "Gather": self._lookup, "Gelu": self._pointwise,
            "MatMul": self._matmul, "Min": self._capped, "Mul": self._arithmetic, "ReduceMean": self._arithmetic,
            "ReduceSum": self._rewritten, "ReduceSumSquare": self._arithmetic, "Relu": self._pointwise,
            "Sigmoid": self._sigmoid, "Slice": self._lookup, "Softmax": self._softmax, "Sqrt": self._root,
            "Sub": self._arithmetic, "Tanh": self._arithmetic,
        }  # fmt: skip

    @property
    def products(self) -> tuple[str, ...]:
        """Give the names of the weight products, all of them integer."""
        return tuple(self._products)

    def visit(self, node: ir.Node) -> None:
        """Code the output of one node."""
        if node in self._done:
            return
        variable = [value for value in node.inputs if value is not None and constant(value) is None]
        table = constant(node.inputs[0]) if node.op_type in ("Gather", "Slice") else None
        is_bias = node.op_type == "Gather" and node.inputs[1] in self._positions  # by distance, not by token
        is_table = table is not None and table.dtype == np.float32 and not is_bias
        if node.op_type == "Shape" or (variable and not is_table and all(map(self._positions.__contains__, variable))):
            self._positions.update(node.outputs)
            return
        of_mask = self._masks.values | self._positions
        if variable and not is_table and all(value in of_mask for value in variable):
            self._masks.values.update(node.outputs)
            return
        if node.op_type in _STILL and variable and variable[0] in self._codes.coded:
            self._still(node)
            return
        if self._sums is not None and self._sums.takes(node):
            self._sums.visit(node)
            return
        if node.op_type not in self._visitors:
            raise Unsupported(f"{node.name}: {node.op_type} has no integer form; use a scheme that leaves it float")
        self._visitors[node.op_type](node)

    def finish(self) -> None:
        """Let the graph's output be the dequantised codes."""
        output = self._codes.graph.outputs[0]
        coded = self._codes.coded[output]
        name = str(output.name)
        codes, bits = vector_codes(self._codes.statistics(output), self._form.output_bits)
        if bits != coded.bits:
            coded = self._codes.requantize(coded, codes, bits, f"{name}/output")
        output.name = f"{name}/real"
        coded.value.name = name
        coded.value.shape, coded.value.dtype = output.shape, ir.DataType.FLOAT
        self._codes.graph.outputs[0] = coded.value

    def _lookup(self, node: ir.Node) -> None:
        table = constant(node.inputs[0])
        if table is None:
            raise Unsupported(f"{node.name}: {node.op_type} of something that is neither a table nor coded")
        if node.op_type == "Gather" and is_pooled(node.outputs[0]):
            scaled_rows(self._codes, node, self._table_bits)
            return
        bits = self._table_bits if node.op_type == "Gather" else 16
        codes = symmetric(float(np.abs(table).max()), bits)
        name = str(node.inputs[0].name)  # type: ignore[union-attr]
        array = affine.quantize(table, codes).astype(INTEGER_DTYPES[bits])
        stored = add_constant(self._codes.graph, f"{name}/codes", array)
        node.replace_input_with(0, stored)
        output = node.outputs[0]
        output.dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT16
        parameters = self._codes.parameters(str(output.name), codes, bits)
        dequantized = add_node_after(node, "DequantizeLinear", [output, *parameters], f"{output.name}/dequantized")
        self._codes.coded[output] = Coded(dequantized, codes, bits)

    def _matmul(self, node: ir.Node) -> None:
        weight = constant(node.inputs[1])
        if weight is not None and roles.has(node, Role.ZERO_ONE_PRODUCT):
            self._choice(node, weight)
            return
        if weight is not None:
            self._product(node, weight)
            return
        left, right = node.inputs
        is_pooling = left in self._masks.values
        if is_pooling:
            share = self._masks.coded(left, SHARE, 16, node)
            node.replace_input_with(0, share.value)
            node.replace_input_with(1, self._codes.read(right, 16, node).value)
            self._codes.store(node, node.outputs[0], self._codes.range(node.outputs[0], 16), 16)
            return
        if self._shares is not None and self._shares.takes(left):
            self._shares.mix(node)
            return
        bits = self._attention_bits(node)
        for position, value in enumerate(node.inputs):
            node.replace_input_with(position, self._codes.read(value, bits, node).value)
        output = node.outputs[0]
        followers = readers(output)
        masked = followers[0] if len(followers) == 1 and self._ends_scores(followers[0]) else None
        codes = self._scores(masked, bits) if masked is not None else self._codes.range(output, bits)
        self._codes.store(node, output, codes, bits)

    def _ends_scores(self, node: ir.Node) -> bool:
        """Tell whether a node is the softmax, or adds the mask, before which scores need no more than it reads."""
        adds_mask = node.op_type == "Add" and any(value in self._masks.values for value in node.inputs)
        return node.op_type == "Softmax" or adds_mask

    def _product(self, node: ir.Node, weight: NDArray[np.float32]) -> None:
        """Code input, weight, bias and output of a weight product."""
        bits = 16 if self._is_wide(node) else self._form.gemm_bits
        source = node.inputs[0]
        read = self._codes.read(source, bits, node)
        seen = self._codes.observed.get(str(source.name))  # type: ignore[union-attr]
        moment = seen.moment if seen is not None else None
        rounded, scales = (
            weight_rounding.compensated(weight, moment, read.affine.scale, self._weight_bits)
            if moment is not None
            else weight_rounding.nearest(weight, self._weight_bits)
        )
        node.replace_input_with(0, read.value)
        node.replace_input_with(1, self._codes.weight(node, rounded, scales))
        self._products.append(str(node.name))
        end = self._biased(node)
        if end is not node:
            missing = np.zeros(len(scales))
            if seen is not None and seen.mean is not None:
                missing = seen.mean.astype(np.float64) @ (weight - rounded * scales.astype(np.float64))
            self._bias(node, end, missing, np.float64(read.affine.scale) * scales)
        output = end.outputs[0]
        self._codes.store(end, output, self._product_range(output, bits), bits)

    def _choice(self, node: ir.Node, matrix: NDArray[np.float32]) -> None:
        """Code a product with zeros and ones; where it only picks, the codes stay."""
        read = self._codes.read(node.inputs[0], 16, node)
        ones = np.ones(matrix.shape[1], np.float32)
        node.replace_input_with(0, read.value)
        node.replace_input_with(1, self._codes.weight(node, matrix.astype(np.int8), ones))
        adds_up = matrix.sum(axis=0).max() > 1.0
        codes = self._codes.range(node.outputs[0], 16) if adds_up else read.affine
        self._codes.store(node, node.outputs[0], codes, 16)

    def _biased(self, product: ir.Node) -> ir.Node:
        """Give the Add of a constant behind a product, or the product itself."""
        reader = next(iter(readers(product.outputs[0])), product)  # the vector itself has no reader
        is_bias = reader.op_type == "Add" and bias_of(reader) is not None and len(product.outputs[0].uses()) == 1
        return reader if is_bias else product

    def _bias(self, product: ir.Node, add: ir.Node, missing: NDArray[np.float64], step: NDArray[np.float64]) -> None:
        """Code a bias in steps of the product's sums; with it goes what rounding the weights takes from their mean."""
        self._done.add(add)
        position, bias = bias_of(add)  # type: ignore[misc]
        codes = np.clip(np.rint((bias + missing) / step), _INT32.min + 1, _INT32.max).astype(np.int32)
        name = str(product.name)
        inputs = [
            add_constant(self._codes.graph, f"{name}/bias/codes", codes),
            add_constant(self._codes.graph, f"{name}/bias/scale", step.astype(np.float32)),
        ]
        add.replace_input_with(position, add_node(add, "DequantizeLinear", inputs, f"{name}/bias", {"axis": 0}))

    def _product_range(self, output: ir.Value, bits: int) -> Affine:
        following = readers(output)
        kinds = {node.op_type for node in following}
        seen = self._codes.statistics(output)
        if bits == 16:
            return self._codes.range(output, 16)
        if kinds <= {"Gelu"}:
            top = max(float(seen.maximum.max()), 0.1)
            return affine.asymmetric(max(float(seen.minimum.min()), GELU_FLOOR), top, 8, signed=True)
        # On the way to 16 bits the step stays exact without a zero point. And what attention multiplies must have none:
        # LiteRT multiplies by a right operand with one in its reference kernel, twenty times slower.
        if kinds <= {"Mul", "Add"} or kinds <= {"Reshape"}:
            return symmetric(self._codes.largest(output), 8)
        return self._codes.range(output, 8)

    def _pointwise(self, node: ir.Node) -> None:
        source = self._codes.coded[node.inputs[0]]  # type: ignore[index]
        node.replace_input_with(0, source.value)
        self._codes.store(node, node.outputs[0], self._codes.range(node.outputs[0], source.bits), source.bits)

    def _softmax(self, node: ir.Node) -> None:
        bits = self._attention_bits(node)
        if self._shares is not None and bits == 8:
            self._shares.weights(node)
            return
        node.replace_input_with(0, self._codes.read(node.inputs[0], bits, node).value)
        self._codes.store(node, node.outputs[0], SOFTMAX[bits], bits)

    def _add(self, node: ir.Node) -> None:
        masks = [position for position, value in enumerate(node.inputs) if value in self._masks.values]
        if not masks:
            self._arithmetic(node)
            return
        bits = self._attention_bits(node)
        position = masks[0]
        scores, mask = node.inputs[1 - position], node.inputs[position]
        size = self._masks.size(mask)
        node.replace_input_with(1 - position, self._codes.read(scores, bits, node).value)
        if bits == 8:
            # A step of the whole size would be right too, but XNNPACK adds only what differs by less than 256 in step.
            steps = Affine(float(np.float32(size / 127)), 127, -128, 127)
            node.replace_input_with(position, self._masks.coded(mask, steps, 8, node).value)
            codes = self._scores(node, bits)
        else:
            lifted = self._masks.lifted(mask, node)
            node.replace_input_with(position, self._masks.coded(lifted, symmetric(size, 16), 16, node).value)
            codes = symmetric(size + self._codes.largest(node.outputs[0]) * HEADROOM, 16)
        self._codes.store(node, node.outputs[0], codes, bits)

    def _arithmetic(self, node: ir.Node) -> None:
        """Code an operator whose operands and result have 16 bits."""
        if node.op_type == "Add" and self._vanishes(node):
            return
        for position, value in enumerate(node.inputs):
            if value is None or (node.op_type.startswith("Reduce") and position > 0):
                continue
            array = constant(value)
            if node.op_type == "Clip" and position > 0:
                continue
            if value in self._masks.values:
                node.replace_input_with(position, self._masks.coded(value, SHARE, 16, node).value)
            elif value in self._positions:
                node.replace_input_with(position, self._position(value, node).value)
            elif array is not None:
                node.replace_input_with(position, self._codes.constant(value, array, node))
            else:
                node.replace_input_with(position, self._codes.read(value, 16, node).value)
        output = node.outputs[0]
        fixed = str(output.name) in self._codes.fixed or self._sums is None
        codes = self._codes.range(output, 16) if fixed or self._sums is None else self._sums.range_of_sum(output)
        self._codes.store(node, output, codes, 16)

    def _position(self, value: ir.Value, node: ir.Node) -> Coded:
        """Give what follows from positions in 16 bits: lowering computes it for each length, and stores codes."""
        key = (value, 16)
        if key not in self._codes.converted:
            codes = symmetric(self._codes.largest(value), 16)
            self._codes.converted[key] = self._codes.quantize(node, value, codes, 16, str(value.name))
        return self._codes.converted[key]

    def _rewritten(self, node: ir.Node) -> None:
        """Code what rewriting put there; a model's own has no integer form."""
        if str(node.outputs[0].name) not in self._codes.fixed:
            raise Unsupported(f"{node.name}: {node.op_type} has no integer form; use a scheme that leaves it float")
        self._arithmetic(node)

    def _sigmoid(self, node: ir.Node) -> None:
        """Code a gate: the operator has 16 bits, and the only codes that it gives."""
        self._codes.fixed.setdefault(str(node.outputs[0].name), SIGMOID)
        self._arithmetic(node)

    def _root(self, node: ir.Node) -> None:
        """Sqrt and Reciprocal are one operator: no codes between them."""
        inverse = readers(node.outputs[0])[0]
        if inverse.op_type != "Reciprocal" or len(node.outputs[0].uses()) != 1:
            raise Unsupported(f"{node.name}: a square root without reciprocal has no integer form")
        read = self._codes.read(node.inputs[0], 16, node)
        node.replace_input_with(0, read.value)
        self._done.add(inverse)
        output = inverse.outputs[0]
        if str(output.name) in self._codes.fixed:
            self._codes.store(inverse, output, self._codes.fixed[str(output.name)], 16)
            return
        # With a power of four below the smallest code seen, 1 / sqrt(code) is the same table for many norms.
        smallest = 1.0 / self._codes.largest(inverse.outputs[0]) ** 2 / read.affine.scale / ROOT_HEADROOM
        power = 4.0 ** max(0.0, float(np.floor(np.log2(max(smallest, 1.0)) / 2.0)))
        scale = float(np.float32(1.0 / (np.sqrt(power * read.affine.scale) * _INT16.max)))
        self._codes.store(inverse, inverse.outputs[0], Affine(scale, 0, _INT16.min, _INT16.max), 16)

    def _still(self, node: ir.Node) -> None:
        """Code what moves values without changing them with the parameters it reads."""
        source = self._codes.coded[node.inputs[0]]  # type: ignore[index]
        node.replace_input_with(0, source.value)
        self._codes.store(node, node.outputs[0], source.affine, source.bits)
        name, before = str(node.outputs[0].name), None
        if node.inputs[0] is not None and name not in self._codes.observed:
            before = self._codes.name_of(source)
        if before is not None and before in self._codes.observed:
            self._codes.observed[name] = self._codes.observed[before]

    def _capped(self, node: ir.Node) -> None:
        """Give max pooling's cap the codes of what it caps: their ends, where it lies beyond every value."""
        hidden, cap = node.inputs
        if hidden not in self._codes.coded or cap not in self._masks.values:
            raise Unsupported(f"{node.name}: a minimum that is no max pooling has no integer form")
        source = self._codes.coded[hidden]
        node.replace_input_with(1, self._masks.coded(cap, source.affine, source.bits, node).value)
        self._still(node)

    def _vanishes(self, node: ir.Node) -> bool:
        """Drop the sum with a constant that is below half a step."""
        for position, value in enumerate(node.inputs):
            array, other = constant(value), node.inputs[1 - position]
            if array is None or other is None or other not in self._codes.coded:
                continue
            coded = self._codes.coded[other]
            if np.abs(array).max() < coded.affine.scale / 2:
                self._codes.coded[node.outputs[0]] = coded
                self._codes.observed[str(node.outputs[0].name)] = self._codes.observed[str(other.name)]
                return True
        return False

    def _is_wide(self, node: ir.Node) -> bool:
        """The side path of large neurons has 16 bits, and so have raised products and those of one row."""
        shape = dims(node.inputs[0])
        is_dense = shape is not None and len(shape) == 2
        return is_dense or roles.has(node, Role.OUTLIER_BRANCH) or node.name in self._wide

    def _is_fine(self, node: ir.Node) -> bool:
        """Tell whether a node computes one token, where whatever has one row may have 16 bits."""
        return roles.has(node, Role.SINGLE_TOKEN) and self._form.wide_matmul and self._form.wide_gelu

    def _attention_bits(self, node: ir.Node) -> int:
        return 16 if self._is_fine(node) else self._form.attention_bits

    def _scores(self, masked: ir.Node, bits: int) -> Affine:
        """Cover scores down to where exp leaves nothing beside the smallest maximum of a row."""
        value = masked.outputs[0] if masked.op_type == "Add" else masked.inputs[0]
        seen = self._codes.statistics(value)  # type: ignore[arg-type]
        if bits == 16:
            return self._codes.range(value, 16)  # type: ignore[arg-type]
        rows = self._codes.observed[f"{value.name}{ROW_MAXIMUM}"]  # type: ignore[union-attr]
        low = float(rows.minimum.min()) - MASKED_BELOW[self._form.shares]
        return affine.asymmetric(low, float(seen.maximum.max()), 8, signed=True)
