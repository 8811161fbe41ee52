"""Move the few feed-forward neurons with outlier activations into a small branch of their own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Statistics
from edgeq.graph.edit import constant
from edgeq.graph.linear import feed_forwards
from edgeq.graph.neuron_groups import Branch, move_neurons
from edgeq.graph.roles import Role

SIDE = "/side"  # ends the names of what belongs to the outlier branch
_BRANCH = Branch(SIDE, Role.OUTLIER_BRANCH, Role.OUTLIER_SUM)
BRANCH_WIDTH = 16  # neurons move in blocks of this many: integer kernels work on such blocks
BRANCH_RATIO = 0.02  # of the neurons of a block
OUTLIER_RATIO = (
    4.0  # a branch of its own pays where a neuron would otherwise take two of the eight bits from all others
)


def split_neurons(
    graph: ir.Graph, observed: Mapping[str, Statistics], swept: Mapping[str, Statistics]
) -> dict[str, Statistics]:
    """Move the neurons with the largest possible contribution of each feed-forward block into an outlier branch.

    A neuron's contribution is bounded by its largest activation times the norm of its row of W2. Two per cent of
    the neurons move, rounded up to a block of 16, if the largest of them is four times what stays; else none does. The
    largest activation counts the vocabulary sweep too: some neurons are inactive on every calibration text, and far
    past every range at a rare name.

    Args:
        graph: edited in place.
        observed: statistics on the calibration texts.
        swept: statistics of the same tensors on a sweep through the vocabulary; used for nothing but this choice.

    Returns:
        The statistics with those of the moved neurons left out.
    """
    kept = dict(observed)
    for block in list(feed_forwards(graph)):
        name = str(block.hidden.name)
        statistics = observed.get(name)
        weight = constant(block.second.inputs[1])
        if statistics is None or weight is None or weight.shape[0] < 4 * BRANCH_WIDTH:
            continue
        largest = np.maximum(statistics.active_magnitudes, swept[name].active_magnitudes)
        bound = largest * np.linalg.norm(weight.astype(np.float64), axis=1)
        width = BRANCH_WIDTH * int(np.ceil(BRANCH_RATIO * weight.shape[0] / BRANCH_WIDTH))
        order = np.argsort(-bound, kind="stable")
        if bound[order[0]] < OUTLIER_RATIO * bound[order[width]]:
            continue
        few = np.sort(order[:width])
        rest = np.setdiff1d(np.arange(weight.shape[0]), few)
        move_neurons(graph, block, few, rest, _BRANCH)
        kept[name] = Statistics(statistics.minimum[rest], statistics.maximum[rest])
    return kept
