"""Average maps as they are, not as tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, made_by, replace_uses


def pool_maps(model: ir.Model) -> Rewrites:
    """Replace the mean over tokens that are turned maps by a mean over the maps.

    Before::

        maps[batch, c, h, w] ─ Reshape[batch, c, hw] ─ Transpose[0, 2, 1] ─ ReduceMean(1)

    After::

        maps ─ ReduceMean(2, 3)

    It saves turning them where nothing else reads the tokens; and OpenVINO 2026.4 gives zeros for all images of a batch
    but the first where the tokens of quantised maps are averaged and are an output, too.
    """
    count, near = 0, []
    for node in list(model.graph):
        turned = made_by(node.inputs[0], "Transpose") if node.op_type == "ReduceMean" else None
        flat = made_by(turned.inputs[0], "Reshape") if turned is not None else None
        shape = dims(flat.inputs[0]) if flat is not None else None
        if turned is None or flat is None or shape is None or len(shape) != 4:
            continue
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        order, tokens = list(turned.attributes["perm"].as_ints()), dims(flat.outputs[0])
        is_plain = axes is not None and axes.reshape(-1).tolist() == [1] and not keeps and order == [0, 2, 1]
        if not is_plain or tokens is None or len(tokens) != 3 or tokens[1] != shape[1] or flat.inputs[0] is None:
            near.append(f"{node.name}: a mean of reshaped maps, but not over their heights and widths")
            continue
        both = add_constant(model.graph, "map_axes", np.array([2, 3], np.int64))
        mean = add_node(node, "ReduceMean", [flat.inputs[0], both], f"{node.name}/maps", {"keepdims": 0})
        replace_uses(node.outputs[0], mean)
        count += 1
    return Rewrites(count, tuple(near))
