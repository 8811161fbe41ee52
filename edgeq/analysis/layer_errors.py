"""Measure the error of each tensor of a QDQ model against the tensor with the same name in its float model.

Both run in ONNX Runtime on the same tokens. Where a scheme rewrites the float model before it quantises (see
`edgeq.quantization.rewrites`), the rewritten float model is the reference: equal names then stand for equal quantities,
and the error is that of quantisation alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.observe import equal_length_batches, observing
from edgeq.calibration.outlier_neurons import SIDE
from edgeq.calibration.statistics import Statistics
from edgeq.data.tokens import Tokens
from edgeq.errors import EdgeqError
from edgeq.graph import channel_axis
from edgeq.graph.edit import constant, dims, readers
from edgeq.graph.operators import LAYOUT
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import Record, Scheme

OUTPUT = "sentence_embedding"

FloatArray = NDArray[np.float32]


class TensorError(Record):
    """Hold the error of one tensor of the QDQ model against the float model's, over all tokens of all texts."""

    name: str
    after: str  # the last weight product or table before it in the graph
    is_stream: bool  # one of the sums that the residual stream passes through, or the vectors
    relative_error: float  # length of the difference over the length of the float model's
    cosine_mean: float  # over tokens
    cosine_min: float

    @property
    def weight(self) -> str:
        """Give the name of the weight before the tensor: exporters name weights, and only number sums."""
        return self.name if self.name == OUTPUT else self.after.removesuffix(SIDE)

    @property
    def label(self) -> str:
        """Give a name for tables and plots: the weight before the tensor, and the tensor's own name."""
        return self.name if self.name == OUTPUT else f"{self.weight} ({self.name})"


class LayerErrors(Record):
    """Hold the errors of one QDQ model's tensors, in the order of the graph."""

    scheme: str
    texts: int
    tensors: tuple[TensorError, ...]

    @property
    def stream(self) -> tuple[TensorError, ...]:
        """Give the tensors of the residual stream."""
        return tuple(tensor for tensor in self.tensors if tensor.is_stream)

    @property
    def entry(self) -> TensorError | None:
        """Give the residual stream's sum with the largest drop of the mean cosine; None without a stream.

        Cosines count, not lengths, because LayerNorm normalises the stream before it is used. The output vectors are no
        such sum: the cosine of a mean over tokens differs from the tokens' cosines.
        """
        sums = [tensor for tensor in self.stream if tensor.name != OUTPUT]
        before = [1.0, *(tensor.cosine_mean for tensor in sums)]
        loss = [last - tensor.cosine_mean for tensor, last in zip(sums, before, strict=False)]
        return sums[int(np.argmax(loss))] if sums else None


def counterpart(model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme) -> onnx.ModelProto:
    """Give the float model, rewritten as the scheme rewrites it before it quantises.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: the calibration's statistics.
        scheme: of the QDQ model.
    """
    return QUANTIZERS[scheme.kind].rewrite(model, observed, scheme)


def residual_stream(model: onnx.ModelProto) -> tuple[str, ...]:
    """List the inputs of LayerNormalization, in the order of the graph, and the output vectors.

    Every rewrite of a scheme keeps these names and what they stand for.

    Args:
        model: equalised FP32 ONNX.
    """
    return (*(node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"), OUTPUT)


def measure(
    float_model: onnx.ModelProto, qdq_model: onnx.ModelProto, tokens: Tokens, stream: Sequence[str]
) -> tuple[TensorError, ...]:
    """Run both models, and measure the error of every tensor of tokens and channels with the same name in both.

    A tensor that all readers read quantised is measured behind its DequantizeLinear.

    Args:
        float_model: what `counterpart` gave.
        qdq_model: made from it.
        tokens: of the texts.
        stream: what `residual_stream` gave.

    Raises:
        EdgeqError: a tensor is NaN or infinite, or the models have no tensor in common.
    """
    chosen = _common(ir.from_proto(float_model).graph, ir.from_proto(qdq_model).graph, frozenset(stream))
    if not chosen:
        raise EdgeqError(
            "the float model and the QDQ model have no tensor in common; a QDQ model made from this float model is "
            "needed. Give the one that the bundle's manifest names."
        )
    names, seen_as = [tensor.name for tensor in chosen], [tensor.seen_as for tensor in chosen]
    reference, quantized = observing(float_model, names), observing(qdq_model, seen_as)
    sums = [_Sums(tensor.axis) for tensor in chosen]
    longest = max(len(ids) for ids in tokens.ids)
    for batch in equal_length_batches(tokens, longest):
        pairs = zip(reference.run(names, batch.feeds), quantized.run(seen_as, batch.feeds), strict=True)
        for total, name, (expected, found) in zip(sums, names, pairs, strict=True):
            total.add(name, expected, found)
    return tuple(total.of(tensor) for tensor, total in zip(chosen, sums, strict=True))


class _Common(Record):
    """Hold a tensor's names in both models."""

    name: str
    seen_as: str  # in the QDQ model
    axis: int  # of the channels, from the end
    after: str
    is_stream: bool


class _Sums:
    """Accumulate errors over batches, without keeping tensors."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._difference = self._length = self._cosines = 0.0
        self._smallest, self._rows = 1.0, 0

    def add(self, name: str, expected: FloatArray, found: FloatArray) -> None:
        """Add the errors of one batch, whose channels lie on one axis of both models' tensors."""
        rows, others = (channel_axis.rows(array, self._axis).astype(np.float64) for array in (expected, found))
        difference, length = np.sum((others - rows) ** 2), np.sum(rows**2)
        if not (np.isfinite(difference) and np.isfinite(length)):
            raise EdgeqError(f"{name}: holds NaN or infinity in one of the models; export it again")
        norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
        cosines = np.clip(np.sum(rows * others, axis=1) / np.where(norms == 0.0, 1.0, norms), -1.0, 1.0)
        self._difference += float(difference)
        self._length += float(length)
        self._cosines += float(cosines.sum())
        self._smallest = min(self._smallest, float(cosines.min()))
        self._rows += len(rows)

    def of(self, tensor: _Common) -> TensorError:
        """Give the tensor's error, averaged over all batches."""
        return TensorError(
            name=tensor.name,
            after=tensor.after,
            is_stream=tensor.is_stream,
            relative_error=float(np.sqrt(self._difference / self._length)) if self._length else 0.0,
            cosine_mean=self._cosines / self._rows,
            cosine_min=self._smallest,
        )


def _common(reference: ir.Graph, quantized: ir.Graph, stream: frozenset[str]) -> list[_Common]:
    """List the tensors of tokens and channels that both graphs compute under one name, and the output vectors."""
    axes = channel_axis.channel_axes(reference)
    theirs = {str(value.name): value for node in quantized for value in node.outputs}
    found: list[_Common] = []
    after = ""
    for node in reference:
        value = node.outputs[0]
        after = _weight_name(node) or after
        name, shape = str(value.name), dims(value)
        axis = axes.get(value, -1)
        is_tokens = value in axes and shape is not None and len(shape) == 3 and shape[axis] != 1
        is_wanted = is_tokens or name in stream or name == OUTPUT  # the stream may be a flat list of tokens
        is_compared = value.dtype == ir.DataType.FLOAT and node.op_type not in LAYOUT and is_wanted
        if is_compared and name in theirs:
            seen_as, is_stream = _as_read(theirs[name]), name in stream
            found.append(_Common(name=name, seen_as=seen_as, axis=axis, after=after, is_stream=is_stream))
    return found


def _weight_name(node: ir.Node) -> str | None:
    """Give a weight product's name, or the table's name of an embedding Gather; None for any other node."""
    position = {"Gemm": 1, "MatMul": 1, "Gather": 0}.get(node.op_type)
    if position is None or constant(node.inputs[position]) is None:
        return None
    return str(node.name if node.op_type in ("Gemm", "MatMul") else node.inputs[0].name)  # type: ignore[union-attr]


def _as_read(value: ir.Value) -> str:
    """Give the name of the tensor that a value's readers read: the dequantised one, if all read that.

    A lookup in a table of codes is codes itself.
    """
    reading = readers(value)
    if len(reading) == 1 and reading[0].op_type == "QuantizeLinear":
        reading = readers(reading[0].outputs[0])
    is_read_as_codes = len(reading) == 1 and reading[0].op_type == "DequantizeLinear"
    return str(reading[0].outputs[0].name if is_read_as_codes else value.name)
