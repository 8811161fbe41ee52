"""List the rewrites of schemes that quantise weight products and leave the rest float, and run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.passes.apply import Pass, apply_to
from edgeq.quantization import range_groups
from edgeq.quantization.rewrites.center_ranges import center_ranges
from edgeq.quantization.rewrites.split_ranges import split_ranges
from edgeq.records import Scheme


def mixed_passes(scheme: Scheme) -> tuple[Pass[Observed], ...]:
    """List the rewrites of a scheme with one range for all texts, in order."""
    return (
        *dynamic_passes(scheme),  # first: what is split reads what is centred
        partial(split_ranges, choose=partial(range_groups.groups, bits=scheme.activation_bits)),
    )


def dynamic_passes(scheme: Scheme) -> tuple[Pass[Observed], ...]:
    """List the rewrites of a scheme with a scale for each token, whose values need no further ranges."""
    return (partial(center_ranges, scheme=scheme),)


def mixed_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], passes: tuple[Pass[Observed], ...],
    feeds: Sequence[AnyFeeds] = (),
) -> tuple[ir.Model, Observed]:  # fmt: skip
    """Rewrite an equalised float model so that 8 bits suit the tensors that products read.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of its tensors.
        passes: the rewrites of the scheme.
        feeds: probe batches on which each rewrite is proved; none where the same was proved before.

    Returns:
        A float model and the statistics of its tensors.

    Raises:
        EdgeqError: a rewrite changed the FP32 function.
    """
    statistics: Observed = dict(observed)
    graph_model, _ = apply_to(model, feeds, passes, statistics)
    return graph_model, statistics
