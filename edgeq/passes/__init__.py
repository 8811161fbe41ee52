"""Rewrite an exported graph, one exact rewrite per file, and prove each by running FP32 before and after.

Every pass takes an `onnx_ir` model, edits it in place and returns `Rewrites`. `apply` runs the passes in the order of
`FLOAT_PASSES`, compares the outputs on probe feeds after each, and takes a pass back that moved them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import external_data
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq import storage
from edgeq.errors import EdgeqError
from edgeq.passes.constant_reshape import constant_reshape
from edgeq.passes.constant_segment import constant_segment
from edgeq.passes.direct_position import direct_position
from edgeq.passes.drop_expand import drop_expand
from edgeq.passes.drop_nan_guard import drop_nan_guard
from edgeq.passes.drop_reshape import drop_reshape
from edgeq.passes.finite_fill import finite_fill
from edgeq.passes.finite_mask import finite_mask
from edgeq.passes.fold_attention_scale import fold_attention_scale
from edgeq.passes.fold_constants import fold_constants
from edgeq.passes.fold_side_scales import fold_side_scales
from edgeq.passes.fold_table_scale import fold_table_scale
from edgeq.passes.graph import Rewrites
from edgeq.passes.known_truths import known_truths
from edgeq.passes.mask_last import mask_last
from edgeq.passes.measured_reshape import measured_reshape
from edgeq.passes.name_weights import name_weights
from edgeq.passes.part_products import part_products
from edgeq.passes.pool_by_matmul import pool_by_matmul
from edgeq.passes.recover_gelu import recover_gelu
from edgeq.passes.recover_layer_normalization import recover_layer_normalization
from edgeq.passes.recover_padding_mask import recover_padding_mask
from edgeq.passes.split_gemm import split_gemm
from edgeq.passes.unflatten_softmax import unflatten_softmax
from edgeq.records import PassReport
from edgeq.reference import FloatSession
from edgeq.samples import AnyFeeds
from edgeq.texts import Feeds

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
    pool_by_matmul,
    finite_fill,
    split_gemm,  # before names are given: a Dense layer is a product like any other
    part_products,  # behind constant_reshape, whose shapes it reads
    fold_attention_scale,
    fold_table_scale,
    fold_side_scales,
    name_weights,  # last: names follow the final weights
)

TOLERANCE = 1e-5
_LARGE_WEIGHT_BYTES = 1 << 16


def apply(
    model: onnx.ModelProto, feeds: Sequence[AnyFeeds], passes: Sequence[Pass] = FLOAT_PASSES
) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    """Run the passes in order, each verified on FP32 outputs.

    Args:
        model: FP32 ONNX with symbolic batch and sequence.
        feeds: probe batches, see `probes.probe_feeds`.
        passes: what to run.

    Returns:
        The rewritten model and one report for each pass.

    Raises:
        EdgeqError: a pass wrote a graph that is invalid, or moved an output by more than 1e-5.
    """
    with storage.work_dir() as folder:
        model = _with_weights_outside(model, folder)
        reports = []
        before = _outputs(model, feeds, folder)
        for rewrite in passes:
            graph = _graph(model, folder)
            done = rewrite(graph)
            error = 0.0
            if done.count:
                RemoveUnusedNodesPass()(graph)
                model = ir.to_proto(graph)
                error = _distance(before, _outputs(model, feeds, folder), feeds)
            name = getattr(rewrite, "__name__", repr(rewrite))
            if not error <= TOLERANCE:
                raise EdgeqError(
                    f"pass {name}: moved the FP32 outputs by {error:.2e}, at most {TOLERANCE:.0e} is allowed; "
                    "this is a defect of edgeq: please report the model"
                )
            reports.append(
                PassReport(name=name, rewrites=done.count, max_abs_error=error, near_misses=done.near_misses)
            )
        whole = ir.to_proto(external_data.load_to_model(_graph(model, folder)))
    return infer_shapes(whole), tuple(reports)


def _with_weights_outside(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Move large weights into a file: every pass serialises and loads the graph, and copying them takes longest."""
    outside = external_data.unload_from_model(
        ir.from_proto(model), folder, "weights", size_threshold_bytes=_LARGE_WEIGHT_BYTES
    )
    return ir.to_proto(outside)


def _graph(model: onnx.ModelProto, folder: Path) -> ir.Model:
    graph = ir.from_proto(model)
    external_data.set_base_dir(graph.graph, folder)
    return graph


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write the shape of every value anew: rewrites leave shapes behind that are no longer true."""
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


Outputs = list[Mapping[str, NDArray[np.float32]]]


def _outputs(model: onnx.ModelProto, feeds: Sequence[AnyFeeds], folder: Path) -> Outputs:
    """Check that the model is valid ONNX, and run it beside its weights."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))
    session = FloatSession.of(path)
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
