"""List the rewrites of schemes that leave quantising to a vendor's compiler."""

from __future__ import annotations

from edgeq.calibration.statistics import Observed
from edgeq.passes.apply import Pass, without_statistics
from edgeq.quantization.rewrites.cast_before_unsqueeze import cast_before_unsqueeze
from edgeq.quantization.rewrites.decompose_gelu import FIRST_OPSET, decompose_gelu
from edgeq.quantization.rewrites.pick_last_token import pick_last_token
from edgeq.quantization.rewrites.slice_counted_positions import slice_counted_positions
from edgeq.quantization.rewrites.split_scaled_layer_normalization import split_scaled_layer_normalization
from edgeq.quantization.rewrites.take_first_token import take_first_token
from edgeq.quantization.rewrites.write_norm_defaults import write_norm_defaults
from edgeq.records import VendorSpec


def vendor_passes(spec: VendorSpec) -> tuple[Pass[Observed], ...]:
    """List the rewrites of a vendor's scheme in order."""
    gelu = (decompose_gelu,) if spec.opset < FIRST_OPSET else ()
    norms = (split_scaled_layer_normalization,) if spec.dtype == "int8" else ()
    return (
        without_statistics(take_first_token),
        without_statistics(pick_last_token),
        without_statistics(slice_counted_positions),  # counting is integer work, which the NPU leaves to the host
        without_statistics(cast_before_unsqueeze),  # its integer half would run on the host
        *gelu,
        *norms,
        write_norm_defaults,  # last: a LayerNormalization that was split off has no other attributes than its source
    )
