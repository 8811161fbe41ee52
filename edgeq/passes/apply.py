"""Rewrite an exported graph, one exact rewrite per file, and prove each by running FP32 before and after.

Every pass takes an `onnx_ir` model, edits it in place and returns `Rewrites`. `apply` runs the passes in the order of
`FLOAT_PASSES`, compares the outputs on probe feeds after each, and takes a pass back that moved them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.data.batches import AnyFeeds
from edgeq.data.tokens import Feeds
from edgeq.errors import EdgeqError
from edgeq.graph import external_data
from edgeq.graph.edit import Rewrites, infer_shapes
from edgeq.graph.float_session import FloatSession
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
from edgeq.records import PassReport
from edgeq.system import files

Pass = Callable[[ir.Model], Rewrites]

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

TOLERANCE = 1e-5
_OUTSIDE_BYTES = 1 << 16


def apply(
    model: onnx.ModelProto, feeds: Sequence[AnyFeeds], passes: Sequence[Pass] = FLOAT_PASSES
) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    """Run the passes in order, each verified on FP32 outputs.

    Args:
        model: FP32 ONNX with symbolic batch and sequence; it loses its large weights to files.
        feeds: probe batches, see `probes.probe_feeds`.
        passes: what to run.

    Returns:
        The rewritten model and one report for each pass. The weights of a large model stay where `weights.outside`
        put them.

    Raises:
        EdgeqError: a pass wrote a graph that is invalid, or moved an output by more than 1e-5.
    """
    if external_data.is_large(model):
        return _apply(model, feeds, passes)
    with files.work_dir() as folder:
        # Every pass serialises and loads the graph, and copying weights takes longest.
        rewritten, reports = _apply(external_data.put_outside(model, folder, _OUTSIDE_BYTES), feeds, passes)
        return external_data.inlined(rewritten), reports


def _apply(
    model: onnx.ModelProto, feeds: Sequence[AnyFeeds], passes: Sequence[Pass]
) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    reports = []
    before = _outputs(model, feeds)
    for rewrite in passes:
        graph = ir.from_proto(model)
        done = rewrite(graph)
        error = 0.0
        if done.count:
            RemoveUnusedNodesPass()(graph)
            model = ir.to_proto(graph)
            error = _distance(before, _outputs(model, feeds), feeds)
        name = getattr(rewrite, "__name__", repr(rewrite))
        if not error <= TOLERANCE:
            raise EdgeqError(
                f"pass {name}: moved the FP32 outputs by {error:.2e}, at most {TOLERANCE:.0e} is allowed; "
                "this is a defect of edgeq: please report the model"
            )
        reports.append(PassReport(name=name, rewrites=done.count, max_abs_error=error, near_misses=done.near_misses))
    return infer_shapes(model), tuple(reports)


Outputs = list[Mapping[str, NDArray[np.float32]]]


def _outputs(model: onnx.ModelProto, feeds: Sequence[AnyFeeds]) -> Outputs:
    """Check that the model is valid ONNX, and run it."""
    onnx.checker.check_model(external_data.bare(model))
    session = FloatSession.of(model)
    return [session.outputs(feed) for feed in feeds]


def _distance(before: Outputs, after: Outputs, feeds: Sequence[AnyFeeds]) -> float:
    """Give the largest absolute difference, relative where an output exceeds 1; NaN counts as infinite.

    What a model gives for padding counts for nothing: a row of attention that sees padding alone may be anything.
    """
    worst = 0.0
    for old, new, feed in zip(before, after, feeds, strict=True):
        for name in old:
            mask = feed.attention_mask.astype(bool) if isinstance(feed, Feeds) else None
            is_of_tokens = mask is not None and old[name].ndim == 3 and old[name].shape[:2] == mask.shape
            kept = mask if is_of_tokens else slice(None)
            scale = max(1.0, float(np.abs(old[name][kept]).max()))
            error = float(np.abs(old[name][kept] - new[name][kept]).max()) / scale
            worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
