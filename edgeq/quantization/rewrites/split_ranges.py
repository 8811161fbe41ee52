"""Give the neurons of a feed-forward block (FFN, GLU) with wide ranges an 8-bit scale of their own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph.edit import Rewrites, constant
from edgeq.graph.linear import feed_forwards
from edgeq.graph.neuron_groups import Branch, move_neurons
from edgeq.quantization import range_groups

WIDE = "/wide"  # ends the names of what belongs to the neurons with wide ranges
GAIN = 1.8  # times less predicted error is worth two products and an Add


def split_ranges(model: ir.Model, observed: Observed) -> Rewrites:
    """Move the neurons with wide ranges into products of their own, so that both tensors get a scale that fits.

    The activation's output is sparse: a few neurons reach ten times what the others do, and all share one scale.

    Before::

        x ─ MatMul(W1) ─ Add(b1) ─ Gelu ─ MatMul(W2) ─ Add(b2)

    After::

        x ─┬─ MatMul(W1 rest) ─ Add ─ Gelu ─ MatMul(W2 rest) ─ Add(b2) ─┐
           └─ MatMul(W1 wide) ─ Add ─ Gelu ─ MatMul(W2 wide) ───────────┴─ Add

    Args:
        model: equalised float model; edited in place.
        observed: statistics by tensor; those of the parts are added.

    """
    count = 0
    for block in list(feed_forwards(model.graph)):
        statistics = observed.get(str(block.hidden.name))
        weight = constant(block.second.inputs[1])
        if statistics is None or weight is None or len(statistics.minimum) != len(weight):
            continue
        wide = range_groups.widest(statistics, weight, GAIN)
        if wide is None:
            continue
        rest = np.setdiff1d(np.arange(len(weight)), wide)
        hidden = move_neurons(model.graph, block, wide, rest, Branch(WIDE))
        observed[str(hidden.name)] = _of(statistics, wide)
        observed[str(block.hidden.name)] = _of(statistics, rest)
        count += 1
    return Rewrites(count)


def _of(statistics: Statistics, channels: NDArray[np.int64]) -> Statistics:
    """Give the statistics of some channels, without a histogram."""
    return Statistics(
        statistics.minimum[channels],
        statistics.maximum[channels],
        moment=None if statistics.moment is None else statistics.moment[np.ix_(channels, channels)],
        mean=None if statistics.mean is None else statistics.mean[channels],
        seen=statistics.seen,
        rows=statistics.rows,
    )
