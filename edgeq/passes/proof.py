"""Compare the FP32 outputs of a model before and after a rewrite with what FP32 itself rounds away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import onnx

from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError
from edgeq.graph import external_data, float_noise
from edgeq.graph.float_noise import Outputs
from edgeq.graph.float_session import FloatSession

FLOOR = 1e-6  # what two orders of summation differ by in FP32, of the largest value; docs/decisions/export.md


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
        moved = float_noise.distances(self._before, outputs_of(model, self._feeds), self._feeds)
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
        return float_noise.allowed(self.noise[output], FLOOR)

    @cached_property
    def noise(self) -> Mapping[str, float]:
        """Give how far each FP32 output is from FP64; 0 where FP64 cannot be computed."""
        return float_noise.noise(self._model, self._feeds, self._before)


def outputs_of(model: onnx.ModelProto, feeds: Sequence[AnyFeeds]) -> list[Outputs]:
    """Check that a model is valid ONNX, and run it."""
    if not feeds:
        return []
    onnx.checker.check_model(external_data.bare(model))
    session = FloatSession.of(model)
    return [session.outputs(feed) for feed in feeds]
