"""Compare the FP32 outputs of a model before and after a rewrite with what FP32 itself rounds away."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq.data.batches import AnyFeeds
from edgeq.data.tokens import Feeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph import double_precision, external_data
from edgeq.graph.float_session import FloatSession

FLOOR = 1e-6  # what two orders of summation differ by in FP32, of the largest value; docs/decisions/export.md
NOISES = 4.0  # how much of the model's own noise a rewrite may move an output by
CEILING = 1e-4  # whatever the noise

Outputs = Mapping[str, NDArray[np.floating]]
_LOG = logging.getLogger(__name__)


class Proof:
    """Hold what a model gave in FP32 before it was rewritten, and how far that is from FP64."""

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[AnyFeeds]) -> None:
        """Run the model.

        Args:
            model: FP32 ONNX; not changed. It is run once more, in FP64, when a rewrite moves more than the least.
            feeds: probe batches; without any, nothing is proved.
        """
        self._model, self._feeds = model, feeds
        self._before = outputs_of(model, feeds)

    def error(self, model: onnx.ModelProto, name: str) -> float:
        """Check a rewritten model, and give how far it moved an output: the largest error, of the largest value.

        Args:
            model: FP32 ONNX.
            name: of the rewrite, for the message.

        Raises:
            EdgeqError: it moved one by more than the model's own noise allows.
        """
        moved = distances(self._before, outputs_of(model, self._feeds), self._feeds)
        for output, error in moved.items():
            if not error <= FLOOR and not error <= self.tolerance(output):
                raise EdgeqError(
                    f"pass {name}: moved the FP32 outputs by {error:.2e} of the largest value of {output}; at most "
                    f"{self.tolerance(output):.1e} is allowed, where the model's own FP32 differs from its FP64 by "
                    f"{self.noise[output]:.1e}; this is a defect of edgeq: please report the model"
                )
        return max(moved.values(), default=0.0)

    def tolerance(self, output: str) -> float:
        """Give how far an output may move: 4 times its noise, at least 1e-6 and at most 1e-4 of the largest value."""
        return min(max(NOISES * self.noise[output], FLOOR), CEILING)

    @cached_property
    def noise(self) -> Mapping[str, float]:
        """Give how far each FP32 output is from FP64; 0 where FP64 cannot be computed."""
        names = [item.name for item in self._model.graph.input]
        try:
            exact = [double_precision.outputs(self._model, feed.named(names)) for feed in self._feeds]
        except Unsupported as error:
            _LOG.info("%s; its noise counts as none", error)
            return dict.fromkeys(self._before[0], 0.0)
        return distances(exact, self._before, self._feeds)


def outputs_of(model: onnx.ModelProto, feeds: Sequence[AnyFeeds]) -> list[Outputs]:
    """Check that a model is valid ONNX, and run it."""
    if not feeds:
        return []
    onnx.checker.check_model(external_data.bare(model))
    session = FloatSession.of(model)
    return [session.outputs(feed) for feed in feeds]


def distances(before: Sequence[Outputs], after: Sequence[Outputs], feeds: Sequence[AnyFeeds]) -> dict[str, float]:
    """Give the largest difference of each output, of the largest value in its batch; NaN counts as infinite.

    What a model gives for padding counts for nothing: a row of attention that sees padding alone may be anything.
    """
    found: dict[str, float] = {}
    for old, new, feed in zip(before, after, feeds, strict=True):
        for name in old:
            mask = feed.attention_mask.astype(bool) if isinstance(feed, Feeds) else None
            is_of_tokens = mask is not None and old[name].ndim == 3 and old[name].shape[:2] == mask.shape
            kept = mask if is_of_tokens else slice(None)
            largest = float(np.abs(old[name][kept]).max(initial=0.0))
            error = float(np.abs(old[name][kept] - new[name][kept]).max(initial=0.0)) / (largest or 1.0)
            found[name] = max(found.get(name, 0.0), error if np.isfinite(error) else float("inf"))
    return found
