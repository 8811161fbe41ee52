"""List the rewrites of schemes that leave nothing float, for integer-only runtimes, and run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.passes.apply import Pass, apply_to, without_statistics
from edgeq.passes.drop_unused_nodes import drop_unused_nodes
from edgeq.quantization.rewrites.center_values import center_values
from edgeq.quantization.rewrites.copied_axes import copied_axes
from edgeq.quantization.rewrites.decompose import DECOMPOSE
from edgeq.quantization.rewrites.factor_layernorm_gain import factor_layernorm_gain
from edgeq.quantization.rewrites.fold_norm_bias import fold_norm_bias
from edgeq.quantization.rewrites.fold_norm_gain import fold_norm_gain
from edgeq.quantization.rewrites.join_positions import join_positions
from edgeq.quantization.rewrites.maps_channels_last import maps_channels_last
from edgeq.quantization.rewrites.patch_convolution import patch_convolution
from edgeq.quantization.rewrites.raw_pixels import raw_pixels
from edgeq.quantization.rewrites.scale_outputs import scale_outputs
from edgeq.quantization.rewrites.single_token_last_layer import single_token_last_layer
from edgeq.quantization.rewrites.split_outlier_weights import split_outlier_weights
from edgeq.records import IntegerSpec

MAPS: tuple[Pass[Observed], ...] = (
    patch_convolution,
    raw_pixels,  # behind it: patches of pixels are a convolution then
    maps_channels_last,
    without_statistics(copied_axes),
)


def integer_passes(spec: IntegerSpec) -> tuple[Pass[Observed], ...]:
    """List the rewrites of an integer-only scheme in order."""
    scales = (partial(scale_outputs, quantile=spec.scaled_output_quantile),) if spec.gemm_bits == 8 else ()
    factors = (factor_layernorm_gain,) if spec.sum_bits == 32 else ()
    return (
        *MAPS,  # before all else: what follows sees maps and tokens in the order that runtimes compute in
        *map(without_statistics, DECOMPOSE),  # before what follows: that folds the gains and biases that these write
        fold_norm_gain,
        join_positions,
        center_values,  # before biases move into those of the values, whose mean was observed without them
        fold_norm_bias,
        *scales,  # behind the biases: a channel's magnitude counts them
        *factors,  # behind the biases, which stand between gain and readers
        split_outlier_weights,  # behind what changes the weights of an outlier branch
        without_statistics(drop_unused_nodes),  # so that nothing else reads what the choice of the token does
        single_token_last_layer,  # last: it moves the choice of the token past all that the others wrote
    )


def integer_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], spec: IntegerSpec, feeds: Sequence[AnyFeeds] = ()
) -> tuple[ir.Model, Observed]:
    """Rewrite an equalised float model into what is quantised then, tensor by tensor.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its decomposed spec.
        spec: which rewrites there are.
        feeds: probe batches on which each rewrite is proved; none where the same was proved before.

    Returns:
        A float model with `sentence_embedding` as its one output, and the statistics of its tensors.

    Raises:
        EdgeqError: a tensor has no statistics, or a rewrite changed the FP32 function.
    """
    statistics: Observed = dict(observed)
    # Unused nodes stay meanwhile: they count as readers where copies of a tensor are numbered.
    graph_model, _ = apply_to(model, feeds, integer_passes(spec), statistics, outputs=1, drops_unused=False)
    return graph_model, statistics
