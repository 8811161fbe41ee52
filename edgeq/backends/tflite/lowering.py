"""Walk an integer-only QDQ model and write each of its operators as one or a few of TFLite's, copying every scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgeq.backends.tflite import functions, masks, moves, pooling, products, shares
from edgeq.backends.tflite.emitter import Emitter, Settings
from edgeq.backends.tflite.writer import ModelWriter
from edgeq.errors import LoweringFailed
from edgeq.graph.dataflow import shape_values

SIGNATURE = "seq_{}"

WRITERS: dict[str, Callable[[Emitter, ir.Node], None]] = {
    "Add": products.sum_or_product,
    "Clip": functions.clip,
    "Exp": shares.exponential,
    "Gather": moves.gather,
    "Gelu": functions.gelu,
    "MatMul": products.matmul,
    "Min": pooling.minimum,
    "Mul": products.elementwise,
    "QuantizeLinear": masks.quantize,
    "ReduceMax": pooling.maximum,
    "ReduceMean": products.mean,
    "ReduceSum": products.total,
    "ReduceSumSquare": products.squares,
    "Relu": functions.relu,
    "Reshape": moves.reshape,
    "Sigmoid": functions.sigmoid,
    "Slice": moves.slice_,
    "Softmax": products.softmax,
    "Sqrt": functions.inverse_root,
    "Squeeze": moves.reshape,
    "Sub": products.elementwise,
    "Tanh": functions.tanh,
    "Transpose": moves.transpose,
}
# Read with another node, or preparing the mask and sizes, which lowering writes in its own way.
_NOTHING_TO_WRITE = frozenset(
    (
        "ArgMax Cast Concat CumSum DequantizeLinear Div Equal Expand Identity Range Reciprocal Round Shape Unsqueeze"
    ).split()
)


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
        out = writer.subgraph(SIGNATURE.format(length))
        _lower_graph(graph_model.graph, Emitter(graph_model.graph, out, length, max(buckets), settings))
    return writer.to_bytes()


def _lower_graph(graph: ir.Graph, emit: Emitter) -> None:
    left_out, of_sizes = shares.left_out(graph, emit.length), shape_values(graph)
    for node in graph:
        if node.outputs[0] in of_sizes:
            continue  # stored where it is read
        if node in left_out:
            shares.unchanged(emit, node)
        elif (writer := shares.writer_of(node)) is not None:
            writer(emit, node)
        elif node.op_type in WRITERS:
            WRITERS[node.op_type](emit, node)
        elif node.op_type not in _NOTHING_TO_WRITE:
            raise LoweringFailed(f"{node.name}: {node.op_type} has no TFLite form")
    output = graph.outputs[0]
    emit.out.output(str(output.name), emit.read(output))
