"""Run rewrites in order, and prove each by running FP32 before and after.

Every rewrite, of float models and of schemes, has one signature: it takes an `onnx_ir` model and the statistics of its
tensors by name, edits both in place, and returns `Rewrites`. One that needs no statistics takes the model alone;
`without_statistics` makes the other of it. `apply` compares the outputs on probe feeds after each rewrite that found
something to do, and raises if one moved them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TypeVar

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.data.batches import AnyFeeds
from edgeq.graph import external_data
from edgeq.graph.edit import Rewrites
from edgeq.passes.proof import Proof
from edgeq.records import PassReport
from edgeq.system import files

StatisticsT = TypeVar("StatisticsT")  # statistics by name of the tensor, or None for a float model
Pass = Callable[[ir.Model, StatisticsT], Rewrites]

_OUTSIDE_BYTES = 1 << 16


def without_statistics(rewrite: Callable[[ir.Model], Rewrites]) -> Pass[object]:
    """Give the signature of all rewrites to one that needs no statistics."""

    @wraps(rewrite)
    def passed(model: ir.Model, statistics: object) -> Rewrites:
        return rewrite(model)

    return passed


def apply_to(
    model: onnx.ModelProto,
    feeds: Sequence[AnyFeeds],
    passes: Sequence[Pass[StatisticsT]],
    statistics: StatisticsT,
    outputs: int | None = None,
    drops_unused: bool = True,
) -> tuple[ir.Model, tuple[PassReport, ...]]:
    """Load an ONNX model and apply rewrites to it.

    Args:
        model: FP32 ONNX with symbolic batch and sequence; not changed.
        feeds: probe batches, see `apply`.
        passes: what to run, in order.
        statistics: of the model's tensors, edited in place.
        outputs: how many of the model's outputs are kept, the first ones; None keeps all.
        drops_unused: see `apply`.

    Returns:
        The rewritten model and one report for each rewrite.

    Raises:
        EdgeqError: see `apply`.
    """
    if not feeds:
        loaded = _loaded(model, outputs)
        return loaded, apply(loaded, feeds, passes, statistics, drops_unused)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with weights_outside(copy) as light:
        loaded = _loaded(light, outputs)
        pairs = _pairs(loaded.graph, ir.from_proto(model).graph)
        reports = apply(loaded, feeds, passes, statistics, drops_unused)
        for value in loaded.graph.initializers.values():
            value.const_value = pairs.get(id(value.const_value), (None, value.const_value))[1]
        return loaded, reports


Tensor = ir.TensorProtocol | None


def _pairs(light: ir.Graph, given: ir.Graph) -> dict[int, tuple[Tensor, Tensor]]:
    """Pair each tensor that lies in a file meanwhile with the given one, by the identity of the first, which is kept.

    What no rewrite changed is written as it was given, to the byte.
    """
    found = ((value.const_value, given.initializers[name].const_value) for name, value in light.initializers.items())
    return {id(outside): (outside, own) for outside, own in found}


@contextmanager
def weights_outside(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Keep the weights of a model in files meanwhile: every proof writes and loads it, and copying them takes longest.

    Where `external_data.outside` is open they stay in its files; else they are gone behind this context.

    Args:
        model: loses its large weights to the files.
    """
    kept = external_data.open_folder()
    if external_data.is_large(model):
        yield model
    elif kept is not None:
        yield external_data.put_outside(model, kept, _OUTSIDE_BYTES)
    else:
        with files.work_dir() as folder:
            yield external_data.put_outside(model, folder, _OUTSIDE_BYTES)


def apply(
    model: ir.Model,
    feeds: Sequence[AnyFeeds],
    passes: Sequence[Pass[StatisticsT]],
    statistics: StatisticsT,
    drops_unused: bool = True,
) -> tuple[PassReport, ...]:
    """Run rewrites in order, each verified on FP32 outputs, with the nodes sorted behind each.

    Args:
        model: FP32 with symbolic batch and sequence; edited in place.
        feeds: probe batches, see `edgeq.data.probes`. Without any, nothing is proved: for trials that repeat on one
            model what was proved once.
        passes: what to run.
        statistics: of the model's tensors, edited in place.
        drops_unused: drop nodes that nothing reads behind each rewrite; else behind the last.

    Returns:
        One report for each rewrite.

    Raises:
        EdgeqError: a rewrite wrote a graph that is invalid, or moved an output by more than the model's noise allows.
    """
    reports = []
    proof = Proof(ir.to_proto(model), feeds) if feeds else None
    for rewrite in passes:
        done = rewrite(model, statistics)
        error = 0.0
        if done.count:
            if drops_unused:
                RemoveUnusedNodesPass()(model)
            TopologicalSortPass()(model)
            error = proof.error(ir.to_proto(model), _name(rewrite)) if proof is not None else 0.0
        reports.append(
            PassReport(name=_name(rewrite), rewrites=done.count, max_abs_error=error, near_misses=done.near_misses)
        )
    RemoveUnusedNodesPass()(model)
    return tuple(reports)


def _loaded(model: onnx.ModelProto, outputs: int | None) -> ir.Model:
    loaded = ir.from_proto(model)
    while outputs is not None and len(loaded.graph.outputs) > outputs:
        loaded.graph.outputs.pop()  # `del outputs[1:]` leaves them marked as outputs
    return loaded


def _name(rewrite: Callable[..., Rewrites]) -> str:
    """Give the name of a function, or of the one that `functools.partial` gave options to."""
    return _name(rewrite.func) if isinstance(rewrite, partial) else getattr(rewrite, "__name__", repr(rewrite))
