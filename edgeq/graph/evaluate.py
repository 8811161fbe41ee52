"""Evaluate a piece of a graph: one node on constants, what makes one value, or all that makes some values.

The first two run in ONNX's reference evaluator (numpy), the last in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.data.batches import PIXELS, AnyFeeds, PixelFeeds
from edgeq.data.tokens import Feeds
from edgeq.errors import EdgeqError
from edgeq.graph.edit import constant, dims
from edgeq.graph.float_session import FloatSession

_OPSET = 21


def of_constants(node: ir.Node) -> NDArray[Any] | None:
    """Run a node with one output whose operands are all constants; None where one is not, or there is none."""
    stored = {str(value.name): constant(value) for value in node.inputs if value is not None}
    known = [numpy_helper.from_array(array, name) for name, array in stored.items() if array is not None]
    if not known or len(known) < len(stored) or len(node.outputs) != 1:
        return None
    return _run([ir.to_proto(node)], [], str(node.outputs[0].name), known, {})


def computed(value: ir.Value | None, feeds: Mapping[str, NDArray[np.int64]]) -> NDArray[Any]:
    """Run the nodes that make a value from inputs, and no others: lowering stores the result instead of computing it.

    Args:
        value: of a graph.
        feeds: arrays for the graph's inputs, by name; at least those that the value depends on.

    Raises:
        EdgeqError: the value depends on an input that is not among the feeds.
    """
    nodes: set[ir.Node] = set()
    stored: dict[str, onnx.TensorProto] = {}
    inputs: set[str] = set()
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each is None or each in seen:
            continue
        seen.add(each)
        array, node = constant(each), each.producer()
        if array is not None:
            stored[str(each.name)] = numpy_helper.from_array(array, str(each.name))
        elif node is None:
            inputs.add(str(each.name))
        elif node not in nodes:
            nodes.add(node)
            waiting += node.inputs
    if value is None or not nodes or not inputs <= set(feeds):
        raise EdgeqError(f"{value.name if value else None}: does not follow from {', '.join(sorted(feeds))} alone")
    graph = next(iter(nodes)).graph
    ordered = [ir.to_proto(node) for node in graph or () if node in nodes]
    given = {name: feeds[name] for name in sorted(inputs)}
    return _run(ordered, sorted(inputs), str(value.name), list(stored.values()), given)


def _run(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str],
    output: str,
    stored: Sequence[onnx.TensorProto],
    feeds: Mapping[str, NDArray[Any]],
) -> NDArray[Any]:
    """Run some nodes in ONNX's reference evaluator."""
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in inputs]
    end = helper.make_tensor_value_info(output, onnx.TensorProto.UNDEFINED, None)
    whole = helper.make_graph(nodes, "computed", ports, [end], stored)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", _OPSET)])
    with np.errstate(all="ignore"):  # what is computed for both branches of a Where need not be a number
        (result,) = ReferenceEvaluator(model).run(None, dict(feeds))
    return np.asarray(result)


def outputs_of(model: ir.Model, values: Sequence[ir.Value], shapes: bool = False) -> FloatSession:
    """Load the part of a graph that computes some values; the model is left as it is.

    Args:
        model: whose inputs are input_ids and attention_mask.
        values: any of its nodes' outputs.
        shapes: give their shapes, int64[dimensions], instead of themselves.
    """
    part = ir.from_proto(ir.to_proto(model))
    found = {value.name: value for node in part.graph for value in node.outputs}
    found |= {value.name: value for value in part.graph.inputs}
    part.graph.outputs.clear()
    for row, value in enumerate(values):
        node = ir.node("Shape" if shapes else "Identity", [found[value.name]], name=f"measured_{row}")
        node.outputs[0].name = f"measured_{row}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64) if shapes else value.type
        part.graph.append(node)
        part.graph.outputs.append(node.outputs[0])
    RemoveUnusedNodesPass()(part)
    return FloatSession.of(ir.to_proto(part))


# Batch and sequence differ from one another, from feed to feed, and from sizes that models have.
MEASURED_SIZES = ((3, 5), (7, 11))


def measured_shapes(model: ir.Model, values: Sequence[ir.Value]) -> list[NDArray[np.int64]]:
    """Give the dimensions of some values for two batch sizes and lengths, int64[sizes, dimensions] each."""
    session = outputs_of(model, values, shapes=True)
    rows = [session.run(None, feeds_of_ones(model, batch, sequence)) for batch, sequence in MEASURED_SIZES]
    return [np.stack(items).astype(np.int64) for items in zip(*rows, strict=True)]


def feeds_of_ones(model: ir.Model, batch: int, sequence: int) -> AnyFeeds:
    """Make a batch of texts of so many tokens, or of images of the size that the model takes."""
    images = next((value for value in model.graph.inputs if value.name == PIXELS), None)
    if images is not None:
        sizes = [size for size in dims(images) or () if isinstance(size, int)]
        return PixelFeeds(np.ones((batch, *sizes), np.float32))
    ones = np.ones((batch, sequence), np.int64)
    return Feeds(ones, ones)
