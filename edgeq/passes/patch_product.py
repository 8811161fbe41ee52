"""Turn the convolution that cuts an image into patches into a weight product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, is_read_once, readers, replace_uses


def patch_product(model: ir.Model) -> Rewrites:
    """Replace a `Conv` whose windows tile the image, and whose maps become tokens, by a product of its patches.

    Before::

        image[batch, 3, H, W] ─ Conv(W[out, 3, p, q], b, strides p q) ─ Reshape[batch, out, n] ─ Transpose[0, 2, 1]

    After::

        image ─ Reshape[batch, 3, H/p, p, W/q, q] ─ Transpose[0, 2, 4, 1, 3, 5] ─ Reshape[batch, n, 3pq]
              ─ MatMul(Wᵀ) ─ Add(b)

    Each pixel stands in one patch, so both forms read it once; the rest of the pipeline sees a product like any other.
    """
    count, near = 0, []
    for node in list(model.graph):
        if node.op_type != "Conv":
            continue
        weight, shape = constant(node.inputs[1]), dims(node.inputs[0])
        if weight is None or weight.ndim != 4 or shape is None or len(shape) != 4:
            continue
        tail = _to_tokens(node)
        if tail is None or not _tiles(node, weight, shape):
            if _strides(node) == list(weight.shape[2:]) != [1, 1]:
                near.append(f"{node.name}: kernel and strides are equal, but its maps do not become tokens as they are")
            continue
        replace_uses(tail.outputs[0], _product(model.graph, node, weight, shape))
        count += 1
    return Rewrites(count, tuple(near))


def _strides(node: ir.Node) -> list[int]:
    return list(node.attributes["strides"].as_ints()) if "strides" in node.attributes else [1, 1]


def _tiles(node: ir.Node, weight: NDArray[np.float32], shape: list[int | str | None]) -> bool:
    """Tell whether the windows lie side by side, with neither padding nor holes nor pixels left over."""
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else [0]
    holes = node.attributes["dilations"].as_ints() if "dilations" in node.attributes else [1]
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    sizes = [isinstance(size, int) and size % step == 0 for size, step in zip(shape[2:], weight.shape[2:], strict=True)]
    is_plain = not any(pads) and set(holes) == {1} and group == 1 and automatic == "NOTSET"
    return is_plain and all(sizes) and _strides(node) == list(weight.shape[2:])


def _to_tokens(node: ir.Node) -> ir.Node | None:
    """Give the Transpose that makes tokens of flattened maps, if nothing else reads them."""
    following = node
    for op_type in ("Reshape", "Transpose"):
        value = following.outputs[0]
        if not is_read_once(value) or readers(value)[0].op_type != op_type:
            return None
        following = readers(value)[0]
    flat = dims(following.inputs[0])
    is_turned = list(following.attributes["perm"].as_ints()) == [0, 2, 1]
    return following if is_turned and flat is not None and len(flat) == 3 and isinstance(flat[2], int) else None


def _product(graph: ir.Graph, node: ir.Node, weight: NDArray[np.float32], shape: list[int | str | None]) -> ir.Value:
    out, channels, height, width = weight.shape
    rows, columns = int(shape[2] or 0) // height, int(shape[3] or 0) // width
    stem = str(node.inputs[1].name if node.inputs[1] is not None else node.name)
    image = node.inputs[0]
    if image is None:
        raise ValueError(f"{node.name} reads nothing")
    cut = add_constant(graph, f"{stem}/cut", np.array([0, channels, rows, height, columns, width], np.int64))
    flat = add_constant(graph, f"{stem}/flat", np.array([0, rows * columns, channels * height * width], np.int64))
    name = f"{node.name or stem}/patches"
    patches = add_node(node, "Reshape", [image, cut], f"{name}/cut")
    patches = add_node(node, "Transpose", [patches], f"{name}/turned", {"perm": [0, 2, 4, 1, 3, 5]})
    patches = add_node(node, "Reshape", [patches, flat], name)
    values = add_constant(graph, f"{stem}/product", np.ascontiguousarray(weight.reshape(out, -1).T))
    product = add_node(node, "MatMul", [patches, values], f"{node.name}/product")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        product = add_node(node, "Add", [product, node.inputs[2]], f"{node.name}/sum")
    return product
