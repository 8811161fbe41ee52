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
            EdgeqError: it moved one by more than 1e-6 of the largest value, and by more than 4 times the noise of the
                model or of its rewritten form, whichever is noisier on these batches, or by more than 1e-4.
        """
        after = outputs_of(model, self._feeds)
        moved = float_noise.distances(self._before, after, self._feeds)
        for output, error in moved.items():
            if error <= FLOOR or error <= float_noise.allowed(self.noise[output], FLOOR):
                continue
            noise = max(self.noise[output], float_noise.noise(model, self._feeds, after)[output])
            if not error <= float_noise.allowed(noise, FLOOR):
                raise EdgeqError(
                    f"pass {name}: moved the FP32 outputs by {error:.2e} of the largest value of {output}; at most "
                    f"{float_noise.allowed(noise, FLOOR):.1e} is allowed, where the model's own FP32 differs from its "
                    f"FP64 by {noise:.1e}; this is a defect of edgeq: please report the model"
                )
        return max(moved.values(), default=0.0)

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
