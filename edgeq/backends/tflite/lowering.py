"""Walk an integer-only QDQ model, and write each ONNX operator as TFLite operators with the same scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgeq.backends.tflite import (
    activations,
    attention_mask,
    data_movement,
    deferred_softmax,
    exact_softmax,
    maps,
    pooling,
    products,
)
from edgeq.backends.tflite.emitter import Emitter, Settings
from edgeq.backends.tflite.sessions import IMAGE, SIGNATURE
from edgeq.backends.tflite.writer import ModelWriter
from edgeq.calibration.observe import tensor_shapes
from edgeq.data.batches import PIXELS
from edgeq.errors import LoweringFailed
from edgeq.graph.dataflow import shape_values

WRITERS: dict[str, Callable[[Emitter, ir.Node], None]] = {
    "Add": products.sum_or_product,
    "AveragePool": maps.pool,
    "Clip": activations.clip,
    "Concat": maps.concat,
    "Conv": maps.convolution,
    "Exp": deferred_softmax.exponential,
    "Gather": data_movement.gather,
    "Gelu": activations.gelu,
    "MatMul": products.matmul,
    "MaxPool": maps.pool,
    "Min": pooling.minimum,
    "Mul": products.elementwise,
    "Pad": maps.pad,
    "QuantizeLinear": attention_mask.quantize,
    "ReduceMax": pooling.maximum,
    "ReduceMean": products.mean,
    "ReduceSum": products.total,
    "ReduceSumSquare": products.squares,
    "Relu": activations.relu,
    "Reshape": data_movement.reshape,
    "Sigmoid": activations.sigmoid,
    "Slice": data_movement.slice_,
    "Softmax": products.softmax,
    "Sqrt": activations.inverse_root,
    "Squeeze": data_movement.reshape,
    "Sub": products.elementwise,
    "Tanh": activations.tanh,
    "Transpose": data_movement.transpose,
}
# Written together with another node, or part of the mask or of sizes, which have writers of their own.
_NOTHING_TO_WRITE = frozenset(
    ("ArgMax Cast CumSum DequantizeLinear Div Equal Expand Identity Range Reciprocal Round Shape Unsqueeze").split()
)


def lower_model(graph_model: ir.Model, buckets: Sequence[int], settings: Settings) -> bytes:
    """Write a .tflite file with one signature for each sequence length, the longest first.

    Args:
        graph_model: the integer-only QDQ model with symbolic shapes.
        buckets: sequence lengths in tokens; not used for images, whose file has one signature.
        settings: of the runtime.

    Raises:
        UnsupportedRange: the scales of this calibration leave what a kernel takes.
        LoweringFailed: an ONNX operator cannot be written.
    """
    writer = ModelWriter("edgeq")
    if takes_images(graph_model.graph):
        length = widest_attention(graph_model)
        _lower_graph(graph_model.graph, Emitter(graph_model.graph, writer.subgraph(IMAGE), length, length, settings))
        return writer.to_bytes()
    for length in sorted(buckets, reverse=True):
        out = writer.subgraph(SIGNATURE.format(length))
        _lower_graph(graph_model.graph, Emitter(graph_model.graph, out, length, max(buckets), settings))
    return writer.to_bytes()


def takes_images(graph: ir.Graph) -> bool:
    """Tell whether a graph reads pixels."""
    return any(value.name == PIXELS for value in graph.inputs)


def widest_attention(graph_model: ir.Model) -> int:
    """Give the most places that one row of attention weighs, at least 1: the axis of what Softmax or Exp gives."""
    shapes = tensor_shapes(ir.to_proto(graph_model))
    rows = (shapes.get(str(node.outputs[0].name)) for node in graph_model.graph if node.op_type in ("Softmax", "Exp"))
    return max((shape[-1] or 1 for shape in rows if shape), default=1)


def _lower_graph(graph: ir.Graph, emit: Emitter) -> None:
    left_out, of_sizes = deferred_softmax.left_out(graph, emit.length), shape_values(graph)
    for node in graph:
        if node.outputs[0] in of_sizes:
            continue  # stored where it is read
        if maps.is_order(node):
            continue  # written with the convolution
        if node in left_out:
            deferred_softmax.unchanged(emit, node)
        elif (writer := exact_softmax.writer_of(node) or deferred_softmax.writer_of(node)) is not None:
            writer(emit, node)
        elif node.op_type in WRITERS:
            WRITERS[node.op_type](emit, node)
        elif node.op_type not in _NOTHING_TO_WRITE:
            raise LoweringFailed(f"{node.name}: {node.op_type} has no TFLite form")
    output = graph.outputs[0]
    emit.out.output(str(output.name), emit.read(output))
