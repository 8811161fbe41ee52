"""List the rewrites of schemes that quantise weight products and leave the rest float, and run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.passes.apply import Pass, apply_to
from edgeq.quantization.rewrites.split_ranges import split_ranges

MIXED_PASSES: tuple[Pass[Observed], ...] = (split_ranges,)


def mixed_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], feeds: Sequence[AnyFeeds] = ()
) -> tuple[ir.Model, Observed]:
    """Rewrite an equalised float model into the one whose weight products are quantised.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of its tensors.
        feeds: probe batches on which each rewrite is proved; none where the same was proved before.

    Returns:
        A float model, and the statistics of its tensors.

    Raises:
        EdgeqError: a rewrite changed the FP32 function.
    """
    statistics: Observed = dict(observed)
    return apply_to(model, feeds, MIXED_PASSES, statistics)[0], statistics
