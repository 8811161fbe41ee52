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
    """List the rewrites of such a scheme in order."""
    return (
        partial(center_ranges, scheme=scheme),  # first: what is split reads what is centred
        partial(split_ranges, choose=partial(range_groups.groups, bits=scheme.activation_bits)),
    )


def mixed_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme, feeds: Sequence[AnyFeeds] = ()
) -> tuple[ir.Model, Observed]:
    """Rewrite an equalised float model so that 8 bits suit the tensors that products read.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of its tensors.
        scheme: bits of tensors and weights.
        feeds: probe batches on which each rewrite is proved; none where the same was proved before.

    Returns:
        A float model and the statistics of its tensors.

    Raises:
        EdgeqError: a rewrite changed the FP32 function.
    """
    statistics: Observed = dict(observed)
    graph_model, _ = apply_to(model, feeds, mixed_passes(scheme), statistics)
    return graph_model, statistics
