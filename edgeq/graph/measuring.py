"""Run a part of a graph, to decide by computing what a value is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.data.batches import PIXELS, AnyFeeds, PixelFeeds
from edgeq.data.tokens import Feeds
from edgeq.graph.edit import dims
from edgeq.graph.float_session import FloatSession


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


def feeds_of_ones(model: ir.Model, batch: int, sequence: int) -> AnyFeeds:
    """Make a batch of texts of so many tokens, or of images of the size that the model takes."""
    images = next((value for value in model.graph.inputs if value.name == PIXELS), None)
    if images is not None:
        sizes = [size for size in dims(images) or () if isinstance(size, int)]
        return PixelFeeds(np.ones((batch, *sizes), np.float32))
    ones = np.ones((batch, sequence), np.int64)
    return Feeds(ones, ones)
