"""Cut an image into patches by a convolution again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.calibration.statistics import Observed
from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, made_by, replace_uses
from edgeq.graph.linear import Linear

PATCHES = "/patches"  # ends the name of what was observed of a convolution's windows, [channels * rows * columns]
_CUT = [0, 2, 4, 1, 3, 5]  # from [batch, channels, rows, p, columns, q] to [batch, rows, columns, channels, p, q]


def patch_convolution(model: ir.Model, statistics: Observed) -> Rewrites:
    """Replace the `MatMul` of an image's patches by the `Conv` whose windows they are.

    Before::

        image ─ Reshape[batch, 3, H/p, p, W/q, q] ─ Transpose[0, 2, 4, 1, 3, 5] ─ Reshape[batch, n, 3pq]
              ─ MatMul(Wᵀ) ─ Add(b)

    After::

        image ─ Conv(W[out, 3, p, q], b, strides p q) ─ Reshape[batch, out, n] ─ Transpose[0, 2, 1]

    Runtimes of integers have a convolution, and may have no Transpose of six axes. It undoes `patch_product`.
    """
    count = 0
    for node in list(model.graph):
        flat = made_by(node.inputs[0], "Reshape") if node.op_type == "MatMul" else None
        turned = made_by(flat.inputs[0], "Transpose") if flat is not None else None
        cut = made_by(turned.inputs[0], "Reshape") if turned is not None else None
        linear = Linear.of(node)
        if flat is None or turned is None or cut is None or linear is None or cut.inputs[0] is None:
            continue
        sizes, image = constant(cut.inputs[1]), dims(cut.inputs[0])
        if sizes is None or len(sizes) != 6 or image is None or list(turned.attributes["perm"].as_ints()) != _CUT:
            continue
        channels, height, width = int(sizes[1]), int(sizes[3]), int(sizes[5])
        weight = linear.weight
        kernel = np.ascontiguousarray(weight.T).reshape(-1, channels, height, width)
        name = str(node.name)
        inputs = [cut.inputs[0], add_constant(model.graph, f"{name}/kernel", kernel)]
        if linear.add is not None:
            inputs.append(add_constant(model.graph, f"{name}/kernel_bias", linear.bias.reshape(-1)))
        rows, columns = int(sizes[2]), int(sizes[4])
        shape = add_constant(model.graph, f"{name}/tokens", np.array([0, len(kernel), rows * columns], np.int64))
        end = linear.end
        maps = add_node(end, "Conv", inputs, f"{name}/maps", {"strides": [height, width]})
        maps.shape, maps.dtype = ir.Shape([image[0], len(kernel), rows, columns]), ir.DataType.FLOAT
        if str(flat.outputs[0].name) in statistics:
            statistics[name + PATCHES] = statistics[str(flat.outputs[0].name)]
        if str(linear.output.name) in statistics:
            statistics[str(maps.name)] = statistics[str(linear.output.name)]
        row = add_node(end, "Reshape", [maps, shape], f"{name}/row")
        row.shape, row.dtype = ir.Shape([image[0], len(kernel), rows * columns]), ir.DataType.FLOAT
        tokens = add_node(end, "Transpose", [row], f"{name}/of_maps", {"perm": [0, 2, 1]})
        _take_name(linear.output, tokens)
        maps.producer().name = name  # type: ignore[union-attr]  # products are named in schemes
        count += 1
    if count:
        RemoveUnusedNodesPass()(model)  # the old way reads the image still
    return Rewrites(count)


def _take_name(old: ir.Value, new: ir.Value) -> None:
    """Let a value stand for another under its name, by which it was observed."""
    name = str(old.name)
    new.shape, new.dtype = old.shape, ir.DataType.FLOAT
    replace_uses(old, new)
    old.name, new.name = f"{name}/of_patches", name
