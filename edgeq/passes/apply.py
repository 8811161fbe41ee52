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
from edgeq.records import PassReport
from edgeq.system import files

Pass = Callable[[ir.Model], Rewrites]


TOLERANCE = 1e-5
_OUTSIDE_BYTES = 1 << 16


def apply(
    model: onnx.ModelProto, feeds: Sequence[AnyFeeds], passes: Sequence[Pass]
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
