"""List the rewrites of schemes for Qualcomm's Hexagon tensor processor (HTP), and run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.graph import roles
from edgeq.graph.edit import checked
from edgeq.graph.roles import Role
from edgeq.passes.apply import Pass, apply_to, without_statistics
from edgeq.passes.matmul_to_gemm import matmul_to_gemm
from edgeq.quantization.rewrites.add_zero_bias import add_zero_bias
from edgeq.quantization.rewrites.center_values import center_values
from edgeq.quantization.rewrites.dense_to_gemm import dense_to_gemm
from edgeq.quantization.rewrites.derive_norm_statistics import derive_norm_statistics
from edgeq.quantization.rewrites.divide_by_multiplying import divide_by_multiplying
from edgeq.quantization.rewrites.join_positions import join_positions
from edgeq.quantization.rewrites.mish_by_sigmoid import mish_by_sigmoid
from edgeq.quantization.rewrites.pick_last_token import pick_last_token
from edgeq.quantization.rewrites.repeat_kv_by_gather import repeat_kv_by_gather
from edgeq.quantization.rewrites.rms_norm_to_operator import rms_norm_to_operator
from edgeq.quantization.rewrites.rotate_half_by_gather import rotate_half_by_gather
from edgeq.quantization.rewrites.rotation_by_gather import rotation_by_gather
from edgeq.quantization.rewrites.scale_outputs import scale_outputs
from edgeq.quantization.rewrites.slice_counted_positions import slice_counted_positions
from edgeq.quantization.rewrites.split_outlier_weights import split_outlier_weights
from edgeq.quantization.rewrites.take_first_token import take_first_token
from edgeq.quantization.rewrites.transpose_pooling import transpose_pooling
from edgeq.quantization.rewrites.unit_length_to_lp_normalization import unit_length_to_lp_normalization
from edgeq.quantization.rewrites.where_to_min import where_to_min
from edgeq.records import HtpSpec


def htp_passes(spec: HtpSpec) -> tuple[Pass[Observed], ...]:
    """List the rewrites of a scheme for HTP in order."""
    scales = (partial(scale_outputs, quantile=spec.scaled_output_quantile),) if spec.gemm_bits == 8 else ()
    return (
        without_statistics(take_first_token),
        without_statistics(pick_last_token),
        without_statistics(where_to_min),
        without_statistics(rotate_half_by_gather),  # as where calibration names its tensors: these in that order
        without_statistics(rotation_by_gather),
        without_statistics(repeat_kv_by_gather),
        without_statistics(slice_counted_positions),
        without_statistics(divide_by_multiplying),
        without_statistics(add_zero_bias),
        without_statistics(rms_norm_to_operator),
        join_positions,
        center_values,
        *scales,
        derive_norm_statistics,
        split_outlier_weights,  # behind the statistics of the norms that a branch reads
        unit_length_to_lp_normalization,
        transpose_pooling,
        dense_to_gemm,  # needs the shapes of what is one row a text, which flattening drops
        partial(matmul_to_gemm, takes_summands=False),  # behind all that read shapes, which it drops
        mish_by_sigmoid,  # on the flat list, where its Sub and Div could not follow
    )


def htp_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], spec: HtpSpec, feeds: Sequence[AnyFeeds] = ()
) -> tuple[ir.Model, Observed, frozenset[str]]:
    """Rewrite an equalised float model: constants folded, tokens a flat list, weight products Gemm.

    LayerNormalization and the unit length stay whole, because HTP has operators for them.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its decomposed spec.
        spec: whether products have 8 bits.
        feeds: probe batches on which each rewrite is proved; none where the same was proved before.

    Returns:
        A float model with `sentence_embedding` as its one output, the statistics of its tensors, and the names of the
        products that have one row a text.

    Raises:
        EdgeqError: a tensor has no statistics, or a rewrite changed the FP32 function.
    """
    statistics: Observed = dict(observed)
    with_shapes = checked(ir.from_proto(model))  # of what equalising added
    graph_model, _ = apply_to(with_shapes, feeds, htp_passes(spec), statistics, outputs=1)
    for value in (value for node in graph_model.graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None  # many have lost an axis
    rows = frozenset(str(node.name) for node in graph_model.graph if roles.has(node, Role.TEXT_PRODUCT))
    return graph_model, statistics, rows
