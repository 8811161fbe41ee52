"""Run a float model over texts in ONNX Runtime, and keep statistics of its tensors in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq.calibration.statistics import Histogram, Statistics
from edgeq.data.batches import Batch, Samples
from edgeq.errors import EdgeqError
from edgeq.graph import channel_axis, external_data
from edgeq.graph.float_session import FloatSession
from edgeq.system import memory
from edgeq.system.progress import StageProgress

MOMENT_ROWS = 4096  # tokens that enter a second moment: more do not change the rounding that follows from it
MOMENT_BLOCK = 512
GROUP_BYTES = 1 << 30  # of observed tensors handed over by one run, and of their second moments
LOWEST, HIGHEST = "/lowest", "/highest"
_FLOAT_BYTES = 4
_ATTENTION_COPIES = 3  # scores, masked scores and probabilities live at once


def equal_length_batches(samples: Samples, longest: int) -> list[Batch]:
    """Batch texts of exactly the same length, so that no padding exists that could enter a statistic.

    No batch holds more tokens than the longest text alone, so memory does not grow with the number of texts.
    """
    return samples.unpadded(longest)


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Sequence[Batch],
    progress: StageProgress,
    histograms: Iterable[str] = (),
    moments: Iterable[str] = (),
    means: Iterable[str] = (),
) -> dict[str, Statistics]:
    """Run the model over the batches and keep statistics of the named tensors.

    Args:
        model: FP32 ONNX.
        tensors: names to keep minimum and maximum of, per channel where `edgeq.graph.channel_axis` can tell which axis
            that is, else of the whole tensor.
        batches: without padding, see `equal_length_batches`.
        progress: called as `progress(done, total)` after each batch.
        histograms: names to keep a histogram of.
        moments: names to keep a second moment and a mean of, where the axis of the channels is known.
        means: names to keep the mean of only, each a tensor of tokens; where the axis is known, too.

    Raises:
        EdgeqError: a tensor held NaN or infinity.
    """
    if not tensors:  # no weight product: a table of tokens and their mean
        return {}
    axes = channel_axis.by_name(model)
    with_histogram, with_moment, with_mean = set(histograms), set(moments) & set(axes), set(means) & set(axes)
    count = sum(batch.feeds.size for batch in batches)
    kept: dict[str, Statistics] = {}

    def add(name: str, array: NDArray[np.float32], size: int) -> None:
        rows = channel_axis.rows(array, axes.get(name))
        total = count * max(1, len(rows) // size)  # an image has many rows, a token one
        low, high = rows.min(0), rows.max(0)
        statistics = _widen(kept, name, low, high)
        if name in with_histogram:
            statistics.histogram = statistics.histogram or Histogram()
            statistics.histogram.add(array, float(max(-low.min(), high.max())))
        if name in with_mean:
            part = rows.sum(0) / np.float32(total)
            statistics.mean = part if statistics.mean is None else statistics.mean + part
        if name in with_moment:
            _add_moment(statistics, rows, max(1, total // MOMENT_ROWS))

    inputs = [name for name in tensors if name in {item.name for item in model.graph.input}]
    made = [name for name in tensors if name not in inputs]
    shapes = tensor_shapes(model)
    whole = [name for name in made if name not in axes and name not in with_histogram]
    channels = {name: shapes[name][axes[name]] for name in with_moment if name in shapes}
    groups = _groups([name for name in made if name not in whole], shapes, _longest(batches), channels)
    runs = len(groups) * len(batches)
    for number, group in enumerate(groups):
        ends = [] if number else [end for name in whole for end in (name + LOWEST, name + HIGHEST)]
        memory.trim()
        session = observing(model, group, () if number else whole)
        for done, batch in enumerate(batches, start=1):
            names = [*group, *ends]
            found = dict(zip(names, session.run(names, batch.feeds) if names else (), strict=True))
            for name, array in batch.feeds.named(inputs).items() if inputs and not number else ():
                add(name, array, batch.feeds.size)
            for name in group:
                add(name, found.pop(name), batch.feeds.size)  # freed at once: the next run hands over as much again
            for name in () if number else whole:
                _widen(kept, name, found[name + LOWEST].reshape(1), found[name + HIGHEST].reshape(1))
            progress(number * len(batches) + done, runs)
        del session
        for name in (*group, *(inputs if not number else ())):
            _finish_moment(kept[name])
    return {name: kept[name] for name in tensors}


def _widen(kept: dict[str, Statistics], name: str, low: NDArray[np.float32], high: NDArray[np.float32]) -> Statistics:
    """Take in the smallest and largest values of one more batch, float32[channels]."""
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise EdgeqError(f"{name}: FP32 gave NaN or infinity on the calibration texts; the float model is broken")
    statistics = kept.get(name)
    if statistics is None:
        statistics = kept[name] = Statistics(low, high)
    else:
        np.minimum(statistics.minimum, low, out=statistics.minimum)
        np.maximum(statistics.maximum, high, out=statistics.maximum)
    return statistics


def tensor_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Give the shapes that the model states; None is an axis that varies."""
    return {
        item.name: tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in shape.dim)
        for item in (*model.graph.value_info, *model.graph.output)
        if (shape := item.type.tensor_type.shape) is not None
    }


def peak_bytes(model: onnx.ModelProto, longest: int) -> int:
    """Bound the memory that `observe` takes above the bare process, for texts of up to `longest` tokens.

    The weights twice (ONNX Runtime packs them anew; it does not where they are large), one layer's attention, and one
    group of observed tensors.
    """
    copies = 1 if external_data.is_large(model) else 2
    attention = max((_size(shape, longest) for shape in tensor_shapes(model).values() if len(shape) == 4), default=0)
    return copies * external_data.size_bytes(model) + _ATTENTION_COPIES * attention + GROUP_BYTES


def _longest(batches: Sequence[Batch]) -> int:
    return max((batch.feeds.size for batch in batches), default=0)


def _size(shape: tuple[int | None, ...], longest: int) -> int:
    """Give the bytes of a tensor, float32[batch, ...], of texts that have `longest` tokens together."""
    return int(np.prod([longest if axis is None else axis for axis in shape[1:]], dtype=np.int64)) * _FLOAT_BYTES


def _groups(
    tensors: Sequence[str],
    shapes: dict[str, tuple[int | None, ...]],
    longest: int,
    channels: Mapping[str, int | None],
) -> list[list[str]]:
    """Split tensors into groups, one for each run, that stay below GROUP_BYTES together with their moments.

    Args:
        tensors: names, in order.
        shapes: that the model states.
        longest: tokens of one batch.
        channels: how many each tensor has of which a second moment is kept.
    """
    groups: list[list[str]] = [[]]
    left = GROUP_BYTES
    for name in tensors:
        shape = shapes.get(name, (None, None, 1))
        size = _size(shape, longest) + (channels.get(name) or 0) ** 2 * _FLOAT_BYTES
        if size > left and groups[-1]:
            groups.append([])
            left = GROUP_BYTES
        groups[-1].append(name)
        left -= size
    return groups


def observing(model: onnx.ModelProto, tensors: Sequence[str], reduced: Sequence[str] = ()) -> FloatSession:
    """Load the model in ONNX Runtime with the tensors as outputs; what only the sentence embedding needs is not run.

    Of `reduced` tensors ReduceMin and ReduceMax give the smallest and the largest value as outputs, float32[] each:
    attention over 4,096 tokens is too large to hand over.
    """
    outputs = len(model.graph.output)
    have = {output.name for output in model.graph.output}
    extra = [name for name in tensors if name not in have]
    added = [
        (name, onnx.helper.make_node(operator, [name], [name + end], keepdims=0))
        for name in reduced
        for end, operator in ((LOWEST, "ReduceMin"), (HIGHEST, "ReduceMax"))
    ]
    ends = {node.output[0] for _, node in added}
    for name, node in added:  # right behind what makes the tensor, so that it can be freed
        made = next(position for position, item in enumerate(model.graph.node) if name in item.output)
        model.graph.node.insert(made + 1, node)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (*extra, *sorted(ends)))
    try:
        return FloatSession.of(model)
    finally:
        del model.graph.output[outputs:]
        for position in reversed(range(len(model.graph.node))):
            if model.graph.node[position].output[0] in ends:
                del model.graph.node[position]


def _add_moment(statistics: Statistics, rows: NDArray[np.float32], stride: int) -> None:
    """Collect every `stride`-th row, and add x xᵀ of them in blocks: one large product costs less than many."""
    statistics.waiting.append(rows[-statistics.seen % stride :: stride].copy())
    statistics.seen += len(rows)
    if sum(map(len, statistics.waiting)) >= MOMENT_BLOCK:
        _flush_moment(statistics)


def _flush_moment(statistics: Statistics) -> None:
    if not statistics.waiting:
        return
    block = np.concatenate(statistics.waiting)
    statistics.waiting.clear()
    if statistics.moment is None or statistics.mean is None:
        statistics.moment = np.zeros((block.shape[1], block.shape[1]), np.float32)
        statistics.mean = np.zeros(block.shape[1], np.float32)
    statistics.moment += block.T @ block
    statistics.mean += block.sum(0)
    statistics.rows += len(block)


def _finish_moment(statistics: Statistics) -> None:
    """Turn sums into means; a large moment of a large model waits in a file."""
    _flush_moment(statistics)
    if statistics.moment is not None and statistics.mean is not None:
        statistics.moment /= statistics.rows
        statistics.mean /= statistics.rows
        statistics.moment = external_data.mapped(statistics.moment)
