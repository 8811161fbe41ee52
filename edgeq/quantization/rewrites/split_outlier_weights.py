"""Where the outlier branch dominates the residual, split its weights W into W8 and W - W8: two 8-bit MatMuls."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.outlier_neurons import SIDE
from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph import roles
from edgeq.graph.edit import Rewrites, add_constant, add_node, insert_after, made_by, readers
from edgeq.graph.linear import Linear
from edgeq.graph.roles import Role
from edgeq.quantization import weight_rounding

DOMINANT = 2.0  # times the block that the branch was split from: rounding its weights then costs more than all else
WEIGHT_BITS = 8  # in every scheme that leaves nothing float
FINE = "/fine"


def split_outlier_weights(model: ir.Model, statistics: Observed, bits: int = WEIGHT_BITS) -> Rewrites:
    """Add what rounding the weights of a dominant outlier branch takes away as a second MatMul; give how many.

    Before::

        x ─ MatMul(W) ─ …

    After, with W' the weights rounded to the scheme's bits::

        x ─┬─ MatMul(W') ───── Add ─ …
           └─ MatMul(W - W') ──┘

    The two give 16-bit weights together. Both products have few columns or few rows, so that they cost little.

    Args:
        model: edited in place.
        statistics: of the block, of the branch and of what it reads; edited in place.
        bits: of the scheme's weights.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        if not roles.has(node, Role.OUTLIER_SUM):
            continue
        second = made_by(node.inputs[1], "MatMul")
        if second is None or not _dominates(node, statistics):
            continue
        for product in [second, *_firsts(second)]:
            count += _split(graph, product, statistics, bits)
    return Rewrites(count)


def _dominates(total: ir.Node, statistics: Observed) -> bool:
    """Tell whether half of the channels get most of their size from the outlier branch."""
    block, branch = (statistics.get(str(value.name)) for value in total.inputs if value is not None)
    if block is None or branch is None:
        return False
    sizes = [seen.magnitudes for seen in (block, branch)]
    return bool(np.median(sizes[1] / np.maximum(sizes[0], 1e-9)) > DOMINANT)


def _firsts(second: ir.Node) -> list[ir.Node]:
    """Find the first products of an outlier branch."""
    found: list[ir.Node] = []
    waiting = [second.inputs[0]]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is None or node in found or not roles.has(node, Role.OUTLIER_BRANCH):
            continue
        if node.op_type == "MatMul":
            found.append(node)
        else:
            waiting += node.inputs
    return found


def _split(graph: ir.Graph, product: ir.Node, statistics: Observed, bits: int) -> int:
    linear, x = Linear.of(product), product.inputs[0]
    seen = statistics.get(str(x.name)) if x is not None else None
    if linear is None or x is None or seen is None:
        return 0
    weight, end = linear.weight, linear.output
    rounded, scales = weight_rounding.nearest(weight, bits)
    coarse = (rounded * scales.astype(np.float64)).astype(np.float32)
    rest = (weight.astype(np.float64) - coarse).astype(np.float32)
    stem = str(product.name).removesuffix(SIDE)
    product.replace_input_with(1, add_constant(graph, f"{stem}.weight/coarse{SIDE}", coarse))
    place = next(each for each in graph if each in set(readers(end)))
    inputs = [x, add_constant(graph, f"{stem}.weight{FINE}{SIDE}", rest)]
    fine = add_node(place, "MatMul", inputs, f"{stem}{FINE}{SIDE}", like=end, role=Role.OUTLIER_BRANCH)
    both = add_node(place, "Add", [end, fine], f"{stem}/both{SIDE}", like=end, role=Role.OUTLIER_BRANCH)
    insert_after(end, both)
    largest = seen.magnitudes @ np.abs(rest)
    statistics[str(fine.name)] = Statistics((-largest).astype(np.float32), largest.astype(np.float32))
    statistics[str(both.name)] = statistics[str(end.name)]
    return 1
