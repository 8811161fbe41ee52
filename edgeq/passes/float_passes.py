"""List the rewrites of every float model, in order, and run them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from edgeq.data.batches import AnyFeeds
from edgeq.graph import external_data
from edgeq.graph.edit import infer_shapes
from edgeq.passes.apply import Pass, apply, weights_outside, without_statistics
from edgeq.passes.attention_pooling import attention_pooling
from edgeq.passes.constant_reshape import constant_reshape
from edgeq.passes.constant_segment import constant_segment
from edgeq.passes.direct_position import direct_position
from edgeq.passes.drop_expand import drop_expand
from edgeq.passes.drop_nan_guard import drop_nan_guard
from edgeq.passes.drop_open_mask import drop_open_mask
from edgeq.passes.drop_reshape import drop_reshape
from edgeq.passes.finite_fill import finite_fill
from edgeq.passes.finite_mask import finite_mask
from edgeq.passes.fold_attention_scale import fold_attention_scale
from edgeq.passes.fold_batch_normalization import fold_batch_normalization
from edgeq.passes.fold_constants import fold_constants
from edgeq.passes.fold_side_scales import fold_side_scales
from edgeq.passes.fold_table_scale import fold_table_scale
from edgeq.passes.known_truths import known_truths
from edgeq.passes.mask_last import mask_last
from edgeq.passes.masked_positions import masked_positions
from edgeq.passes.measured_reshape import measured_reshape
from edgeq.passes.name_weights import name_weights
from edgeq.passes.part_products import part_products
from edgeq.passes.patch_product import patch_product
from edgeq.passes.pointwise_product import pointwise_product
from edgeq.passes.pool_by_matmul import pool_by_matmul
from edgeq.passes.pool_maps import pool_maps
from edgeq.passes.recover_gelu import recover_gelu
from edgeq.passes.recover_layer_normalization import recover_layer_normalization
from edgeq.passes.recover_padding_mask import recover_padding_mask
from edgeq.passes.split_gemm import split_gemm
from edgeq.passes.tokens_before_channels import tokens_before_channels
from edgeq.passes.unflatten_softmax import unflatten_softmax
from edgeq.records import PassReport

_REWRITES = (
    fold_constants,  # first: what follows looks for constants
    fold_batch_normalization,
    pointwise_product,
    tokens_before_channels,  # before what looks for channels on the last axis: layer normalisation, pooling, heads
    recover_layer_normalization,  # before all else: the later passes look for whole LayerNormalization and Gelu nodes
    recover_gelu,
    drop_reshape,
    unflatten_softmax,  # before the masks, which are found by the softmax behind them
    known_truths,  # before masks, which are made of conditions
    finite_mask,  # before shapes: it removes most of the shape arithmetic by itself
    recover_padding_mask,  # what finite_mask left: other exporters' arithmetic, decided by computing it
    masked_positions,  # what is left then: masks that are one with a bias by positions
    drop_nan_guard,  # needs the finite mask
    mask_last,  # needs it, too
    constant_segment,
    direct_position,
    constant_reshape,  # needs the symbolic shapes that the exporter wrote, so before nodes are added without them
    measured_reshape,  # what inference does not know is measured
    drop_expand,
    drop_open_mask,
    patch_product,  # needs the shapes of maps, so before nodes are added without them
    pool_by_matmul,
    pool_maps,
    finite_fill,
    split_gemm,  # before names are given: a Dense layer is a product like any other
    attention_pooling,  # behind it: its result is projected by a Gemm
    part_products,  # behind constant_reshape, whose shapes it reads
    fold_attention_scale,
    fold_table_scale,
    fold_side_scales,
    name_weights,  # last: names follow the final weights
)
FLOAT_PASSES: tuple[Pass[object], ...] = tuple(map(without_statistics, _REWRITES))


def rewritten(model: onnx.ModelProto, feeds: Sequence[AnyFeeds]) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    """Apply every rewrite of float models, and infer the shapes of what they wrote.

    Args:
        model: FP32 ONNX with symbolic batch and sequence, as an exporter wrote it; it loses its large weights.
        feeds: probe batches, see `edgeq.data.probes`.

    Returns:
        The float model and one report for each rewrite.

    Raises:
        EdgeqError: a rewrite wrote a graph that is invalid, or moved an output by more than the model's noise allows.
    """
    with weights_outside(model) as light:
        loaded = ir.from_proto(light)
        reports = apply(loaded, feeds, FLOAT_PASSES, None)
        proto = infer_shapes(ir.to_proto(loaded))
        stays = external_data.open_folder() is not None or external_data.is_large(proto)
        return proto if stays else external_data.inlined(proto), reports
