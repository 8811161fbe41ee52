"""Give the neurons of a feed-forward block (FFN, GLU) with wide ranges an 8-bit scale of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph.edit import Rewrites, constant
from edgeq.graph.linear import feed_forwards
from edgeq.graph.neuron_groups import Branch, move_neurons

WIDE = "/wide"  # ends the names of what belongs to the neurons with wide ranges
Choose = Callable[[Statistics, NDArray[np.float32]], Sequence[NDArray[np.int64]]]


def split_ranges(model: ir.Model, observed: Observed, choose: Choose) -> Rewrites:
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
        choose: gives the neurons of each group that gets products of its own.
    """
    count = 0
    for block in list(feed_forwards(model.graph)):
        statistics = observed.get(str(block.hidden.name))
        weight = constant(block.second.inputs[1])
        if statistics is None or weight is None or len(statistics.minimum) != len(weight):
            continue
        groups = choose(statistics, weight)
        left = np.arange(len(weight))
        for number, group in enumerate(groups, start=1):
            few, rest = np.searchsorted(left, group), np.flatnonzero(~np.isin(left, group))
            suffix = WIDE if number == 1 else f"{WIDE}_{number}"
            hidden = move_neurons(model.graph, block, few, rest, Branch(suffix))
            observed[str(hidden.name)] = _of(statistics, group)
            left = left[rest]
            block = next(each for each in feed_forwards(model.graph) if each.second is block.second)
        if groups:
            observed[str(block.hidden.name)] = _of(statistics, left)
        count += len(groups)
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
