"""Turn an equalised float model into a QDQ model for Hexagon's tensor unit: unsigned codes on every tensor.

LayerNorm and the unit length stay whole, because the unit has operators for them. Which tensors have 8 bits follows
from one rule, not from names: what weight products and attention read and give has the scheme's bits; sums (residual,
positions, values over tokens), LayerNorm, pooling, the side path of large neurons and what is one row a text have 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, add_node_after, constant, readers
from edgeq.graph.roles import Role
from edgeq.quantization import affine, weight_rounding
from edgeq.quantization.affine import Affine
from edgeq.quantization.htp.attention_mask import LookedUpMasks
from edgeq.quantization.htp.qdq import UnsignedGraph
from edgeq.quantization.htp.unsupported import refusal
from edgeq.quantization.qdq import HEADROOM, Coded, finished
from edgeq.quantization.ranges import GELU_FLOOR, MASKED_BELOW
from edgeq.quantization.rewrites.htp import htp_form
from edgeq.quantization.rewrites.observe_row_maxima import ROW_MAXIMUM
from edgeq.records import HtpForm, Scheme

GAIN_BITS = 8  # LayerNorm's gain: the unit takes no other beside an int32 bias, on any version
# Of what takes a sum of a channel to the output's codes: v68 keeps no more, and where a multiplier has more, all of the
# channel is off by up to 20 codes of 65,536 (measured in QAIRT 2.51's emulator; later versions keep more).
_MULTIPLIER_BITS = 11
_STILL = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather"})
_INT32 = np.iinfo(np.int32)


def quantize_htp(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme, feeds: Sequence[AnyFeeds] = ()
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """Bring weight products to Gemm form, fold constants, and give every tensor unsigned codes.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its primitives.
        scheme: with an `htp` form.
        feeds: probe batches on which each rewrite is proved.

    Returns:
        The QDQ model, the names of the integer products, and an empty tuple: nothing stays float.

    Raises:
        Unsupported: the graph holds what has no form here.
        EdgeqError: a tensor has no statistics.
    """
    form = scheme.htp
    if form is None:
        raise EdgeqError(f"{scheme.name} has no form for HTP")
    graph_model, seen, rows = htp_form(model, observed, form, feeds)
    graph = graph_model.graph
    coder = _Coder(graph, seen, scheme, form, rows)
    for node in list(graph):
        coder.visit(node)
    coder.finish()
    return finished(graph_model), coder.products, ()


class _Coder:
    """Walk the graph in order and put QuantizeLinear and DequantizeLinear behind every tensor."""

    def __init__(
        self, graph: ir.Graph, observed: Observed, scheme: Scheme, form: HtpForm, rows: frozenset[str]
    ) -> None:
        self._codes = UnsignedGraph(graph, observed)
        self._form = form
        self._scheme = scheme
        self._wide = rows | frozenset(scheme.raised)
        self._masks = LookedUpMasks(self._codes)
        self._sizes: set[ir.Value] = set()
        self._products: list[str] = []

    @property
    def products(self) -> tuple[str, ...]:
        """Give the names of the weight products, all of them integer."""
        return tuple(self._products)

    def visit(self, node: ir.Node) -> None:
        """Code the output of one node."""
        variable = [value for value in node.inputs if value is not None and constant(value) is None]
        if node.op_type == "Shape" or (variable and all(value in self._sizes for value in variable)):
            if node.op_type != "Slice":
                self._sizes.update(node.outputs)
                return
        elif variable and all(value in self._masks.values or value in self._sizes for value in variable):
            self._masks.values.update(node.outputs)
            return
        if node.op_type in _STILL and node.inputs[0] in self._codes.coded:
            source = self._codes.coded[node.inputs[0]]
            node.replace_input_with(0, source.value)
            self._store(node, source.affine, source.bits)
            self._keep_statistics(node, source)
            return
        if node.op_type not in _VISITORS:
            raise Unsupported(refusal(node))
        _VISITORS[node.op_type](self, node)

    def finish(self) -> None:
        """Let the graph's output be the dequantised codes."""
        output = self._codes.graph.outputs[0]
        coded, name = self._codes.read(output, 16, output.producer()), str(output.name)  # type: ignore[arg-type]
        output.name = f"{name}/real"
        coded.value.name = name
        coded.value.shape, coded.value.dtype = output.shape, ir.DataType.FLOAT
        self._codes.graph.outputs[0] = coded.value

    def _store(self, node: ir.Node, codes: Affine, bits: int) -> None:
        self._codes.store(node, node.outputs[0], codes, bits)

    def _keep_statistics(self, node: ir.Node, source: Coded) -> None:
        name, before = str(node.outputs[0].name), self._codes.name_of(source)
        if name not in self._codes.observed and before in self._codes.observed:
            self._codes.observed[name] = self._codes.observed[before]

    def _lookup(self, node: ir.Node) -> None:
        """Look up rows of a table; the operator's codes are the table's."""
        table = constant(node.inputs[0])
        if table is None:
            raise Unsupported(refusal(node, "Gather of something that is neither a table nor coded"))
        stored = self._codes.table(str(node.inputs[0].name), table, self._scheme.embedding_bits, node)  # type: ignore[union-attr]
        node.replace_input_with(0, stored.value)
        self._store(node, stored.affine, stored.bits)

    def _rows(self, node: ir.Node) -> None:
        """Take rows of the table of positions: constant as soon as the length is."""
        table = constant(node.inputs[0])
        if table is None:
            raise Unsupported(refusal(node, "Slice of something that is neither a table nor coded"))
        self._masks.longest = table.shape[-2]
        name = str(node.inputs[0].name)  # type: ignore[union-attr]
        codes = self._codes.cover(float(table.min()), float(table.max()), 16)
        stored = affine.quantize(table, codes).astype(self._codes.dtypes[16])
        node.replace_input_with(0, add_constant(self._codes.graph, f"{name}/codes", stored))
        output = node.outputs[0]
        output.dtype = ir.DataType.UINT16
        parameters = self._codes.parameters(str(output.name), codes, 16)
        dequantized = add_node_after(node, "DequantizeLinear", [output, *parameters], f"{output.name}/dequantized")
        self._codes.coded[output] = Coded(dequantized, codes, 16)

    def _product(self, node: ir.Node) -> None:
        """Code input, weight, bias and output of a weight product."""
        weight, source = constant(node.inputs[1]), node.inputs[0]
        if weight is None or source is None:
            raise Unsupported(refusal(node, "a Gemm of two variable tensors has no form for HTP"))
        bits = 16 if self._is_wide(node) else self._form.gemm_bits
        read = self._codes.read(source, bits, node)
        seen = self._codes.observed.get(self._codes.name_of(self._codes.coded[source]))
        moment = seen.moment if seen is not None else None
        rounded, scales = (
            weight_rounding.compensated(weight, moment, read.affine.scale, self._scheme.weight_bits)
            if moment is not None
            else weight_rounding.nearest(weight, self._scheme.weight_bits)
        )
        codes = self._product_range(node.outputs[0], bits)
        if bits == 16:
            ratio = np.float64(read.affine.scale) / codes.scale
            scales = (affine.significant(scales * ratio, _MULTIPLIER_BITS) / ratio).astype(np.float32)
        missing = np.zeros(len(scales))
        if seen is not None and seen.mean is not None:  # what rounding takes from the mean goes into the bias
            missing = seen.mean.astype(np.float64) @ (weight - rounded * scales.astype(np.float64))
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        step = np.float64(read.affine.scale) * scales
        summand = self._summand(node, missing if bias is None else bias + missing, step)
        inputs = [read.value, self._codes.weight(node, rounded, scales), summand]
        node.resize_inputs(len(inputs))
        for position, value in enumerate(inputs):
            node.replace_input_with(position, value)
        self._products.append(str(node.name))
        self._store(node, codes, bits)

    def _product_range(self, output: ir.Value, bits: int) -> Affine:
        if bits == 16 or any(node.op_type != "Gelu" for node in readers(output)):
            return self._codes.range(output, bits)
        seen = self._codes.statistics(output)
        return self._codes.cover(max(float(seen.minimum.min()), GELU_FLOOR), float(seen.maximum.max()), bits)

    def _summand(self, node: ir.Node, bias: NDArray[np.floating], step: NDArray[np.floating]) -> ir.Value:
        """Code a bias in int32, in steps of what it is added to."""
        codes = np.clip(np.rint(bias / step), _INT32.min + 1, _INT32.max).astype(np.int32)
        inputs = [
            add_constant(self._codes.graph, f"{node.name}/bias/codes", codes),
            add_constant(self._codes.graph, f"{node.name}/bias/scale", np.asarray(step, np.float32)),
        ]
        attributes = {"axis": 0} if np.ndim(step) else None
        return add_node(node, "DequantizeLinear", inputs, f"{node.name}/bias", attributes)

    def _is_wide(self, node: ir.Node) -> bool:
        """The side path of large neurons has 16 bits, and so have what is one row a text and what is raised."""
        return roles.has(node, Role.OUTLIER_BRANCH) or node.name in self._wide

    def _norm(self, node: ir.Node) -> None:
        gain = constant(node.inputs[1])
        if gain is None:
            raise Unsupported(refusal(node, "LayerNormalization with a computed gain has no form for HTP"))
        read = self._codes.read(node.inputs[0], 16, node)
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(gain)
        stored = self._codes.table(f"{node.name}/gain", gain, GAIN_BITS, node)
        step = np.float64(read.affine.scale * stored.affine.scale)
        summand = self._summand(node, bias, step)  # type: ignore[arg-type]
        for position, value in enumerate((read.value, stored.value)):
            node.replace_input_with(position, value)
        if len(node.inputs) > 2:
            node.replace_input_with(2, summand)
        self._store(node, self._codes.range(node.outputs[0], 16), 16)

    def _matmul(self, node: ir.Node) -> None:
        if any(value in self._masks.values for value in node.inputs):
            self._pooling(node)
            return
        bits = self._form.attention_bits
        for position, value in enumerate(node.inputs):
            node.replace_input_with(position, self._codes.read(value, bits, node).value)
        followers = readers(node.outputs[0])
        if len(followers) == 1 and followers[0].op_type in ("Add", "Softmax"):
            self._store(node, self._scores(followers[0], bits), bits)
        else:  # of the values: an 8-bit result is rounded otherwise over more tokens, padding or not
            self._store(node, self._codes.range(node.outputs[0], 16), 16)

    def _pooling(self, node: ir.Node) -> None:
        for position, value in enumerate(node.inputs):
            coded = self._masks.share(value) if value in self._masks.values else self._codes.read(value, 16, node)
            node.replace_input_with(position, coded.value)
        self._store(node, self._codes.range(node.outputs[0], 16), 16)

    def _add(self, node: ir.Node) -> None:
        position = next((p for p, value in enumerate(node.inputs) if value in self._masks.values), None)
        if position is None:
            self._arithmetic(node)
            return
        bits = self._form.attention_bits
        mask, scores = node.inputs[position], node.inputs[1 - position]
        node.replace_input_with(position, self._masks.lowered(mask, bits, node).value)
        node.replace_input_with(1 - position, self._codes.read(scores, bits, node).value)
        self._store(node, self._scores(node, bits), bits)

    def _scores(self, masked: ir.Node, bits: int) -> Affine:
        """Cover scores down to where exp leaves nothing beside the smallest maximum of a row; masked ones saturate."""
        value = masked.outputs[0] if masked.op_type == "Add" else masked.inputs[0]
        seen = self._codes.statistics(value)  # type: ignore[arg-type]
        rows = self._codes.observed[f"{value.name}{ROW_MAXIMUM}"]  # type: ignore[union-attr]
        low, high = float(rows.minimum.min()), float(seen.maximum.max())
        room = (HEADROOM - 1.0) * (high - float(seen.minimum.min())) if bits == 16 else 0.0
        return self._codes.cover(low - MASKED_BELOW["softmax"] - room, high + room, bits)

    def _pointwise(self, node: ir.Node) -> None:
        source = self._codes.coded[node.inputs[0]]  # type: ignore[index]
        node.replace_input_with(0, source.value)
        self._store(node, self._codes.range(node.outputs[0], source.bits), source.bits)

    def _softmax(self, node: ir.Node) -> None:
        bits = self._form.attention_bits
        node.replace_input_with(0, self._codes.read(node.inputs[0], bits, node).value)
        self._store(node, Affine(2.0**-bits, 0, 0, 2**bits - 1), bits)

    def _fixed(self, node: ir.Node) -> None:
        """Code what has one range for all inputs, in 16 bits.

        Source: onnxruntime 1.31, python/tools/quantization/execution_providers/qnn/quant_config.py: HTP fixes these.
        """
        node.replace_input_with(0, self._codes.read(node.inputs[0], 16, node).value)
        is_positive = node.op_type == "Sigmoid"
        codes = Affine(2.0**-16, 0, 0, 65535) if is_positive else Affine(2.0**-15, 32768, 0, 65535)
        self._store(node, codes, 16)

    def _arithmetic(self, node: ir.Node) -> None:
        """Code an operator whose operands and result have 16 bits."""
        for position, value in enumerate(node.inputs):
            array = constant(value)
            if value is not None and array is not None:
                node.replace_input_with(position, self._codes.constant(value, array, node))
            else:
                node.replace_input_with(position, self._codes.read(value, 16, node).value)
        self._store(node, self._codes.range(node.outputs[0], 16), 16)


_VISITORS: Mapping[str, Callable[[_Coder, ir.Node], None]] = {
    "Add": _Coder._add, "Gather": _Coder._lookup, "Gelu": _Coder._pointwise, "Gemm": _Coder._product,
    "LayerNormalization": _Coder._norm, "LpNormalization": _Coder._fixed, "MatMul": _Coder._matmul,
    "Mul": _Coder._arithmetic, "Relu": _Coder._pointwise, "Sigmoid": _Coder._fixed, "Slice": _Coder._rows,
    "Softmax": _Coder._softmax, "Sub": _Coder._arithmetic, "Tanh": _Coder._fixed,
}  # fmt: skip
OPERATORS = frozenset(_VISITORS) | _STILL
