"""List the rewrites of every float model, in order."""

from __future__ import annotations

from edgeq.passes.apply import Pass
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
from edgeq.passes.fold_constants import fold_constants
from edgeq.passes.fold_side_scales import fold_side_scales
from edgeq.passes.fold_table_scale import fold_table_scale
from edgeq.passes.known_truths import known_truths
from edgeq.passes.mask_last import mask_last
from edgeq.passes.measured_reshape import measured_reshape
from edgeq.passes.name_weights import name_weights
from edgeq.passes.part_products import part_products
from edgeq.passes.patch_product import patch_product
from edgeq.passes.pool_by_matmul import pool_by_matmul
from edgeq.passes.pool_maps import pool_maps
from edgeq.passes.recover_gelu import recover_gelu
from edgeq.passes.recover_layer_normalization import recover_layer_normalization
from edgeq.passes.recover_padding_mask import recover_padding_mask
from edgeq.passes.split_gemm import split_gemm
from edgeq.passes.unflatten_softmax import unflatten_softmax

FLOAT_PASSES: tuple[Pass, ...] = (
    fold_constants,  # first: what follows looks for constants
    recover_layer_normalization,  # before all else: the later passes look for whole LayerNormalization and Gelu nodes
    recover_gelu,
    drop_reshape,
    unflatten_softmax,  # before the masks, which are found by the softmax behind them
    known_truths,  # before masks, which are made of conditions
    finite_mask,  # before shapes: it removes most of the shape arithmetic by itself
    recover_padding_mask,  # what finite_mask left: other exporters' arithmetic, decided by computing it
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
    part_products,  # behind constant_reshape, whose shapes it reads
    fold_attention_scale,
    fold_table_scale,
    fold_side_scales,
    name_weights,  # last: names follow the final weights
)
