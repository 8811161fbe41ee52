"""Say how far two FP32 computations of one model may be apart: its noise is how far FP32 is from FP64."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq.data.batches import AnyFeeds
from edgeq.data.tokens import Feeds
from edgeq.errors import Unsupported
from edgeq.graph import double_precision

NOISES = 4.0  # how much of the model's own noise may lie between two computations
CEILING = 1e-4  # of the largest value, whatever the noise

Outputs = Mapping[str, NDArray[np.floating]]
_LOG = logging.getLogger(__name__)


def allowed(noise: float, floor: float) -> float:
    """Give the largest error that counts as rounding: 4 times the noise, no less than a floor, at most 1e-4."""
    return min(max(NOISES * noise, floor), CEILING)


def noise(
    model: onnx.ModelProto, feeds: Sequence[AnyFeeds], given: Sequence[Outputs], least: float = 0.0
) -> dict[str, float]:
    """Run an FP32 model in FP64, and give how far each FP32 output is from that.

    Args:
        model: FP32 ONNX. Its run takes up to a second for each batch.
        feeds: the batches.
        given: the FP32 outputs for each, all of them or some.
        least: see `distances`.

    Returns:
        The largest error of each output of `given`; 0 where an operator cannot be computed in FP64.
    """
    names = [item.name for item in model.graph.input]
    try:
        exact = [double_precision.outputs(model, feed.named(names)) for feed in feeds]
    except Unsupported as error:
        _LOG.info("%s; the model's noise counts as none", error)
        return {name: 0.0 for outputs in given for name in outputs}
    return distances(given, exact, feeds, least)


def distances(
    before: Sequence[Outputs], after: Sequence[Outputs], feeds: Sequence[AnyFeeds], least: float = 0.0
) -> dict[str, float]:
    """Give the largest difference of each output, of the largest value in its batch; NaN counts as infinite.

    What a model gives for padding counts for nothing: a row of attention that sees padding alone may be anything.

    Args:
        before: the outputs for each batch by name.
        after: the same, and maybe more.
        feeds: the batches.
        least: what counts as the largest value where that is smaller.
    """
    found: dict[str, float] = {}
    for old, new, feed in zip(before, after, feeds, strict=True):
        for name in old:
            mask = feed.attention_mask.astype(bool) if isinstance(feed, Feeds) else None
            is_of_tokens = mask is not None and old[name].ndim == 3 and old[name].shape[:2] == mask.shape
            kept = mask if is_of_tokens else ...
            largest = float(np.abs(old[name][kept]).max(initial=0.0))
            error = float(np.abs(old[name][kept] - new[name][kept]).max(initial=0.0)) / (max(largest, least) or 1.0)
            found[name] = max(found.get(name, 0.0), error if np.isfinite(error) else float("inf"))
    return found
