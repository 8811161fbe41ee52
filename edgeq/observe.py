"""Run a float model over texts and keep statistics of its tensors in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq.errors import EdgeqError
from edgeq.reference import FloatSession
from edgeq.samples import Batch, Samples

BINS = 2048
MOMENT_ROWS = 4096  # tokens that enter a second moment: more do not change the rounding that follows from it
MOMENT_BLOCK = 512


@dataclass
class Histogram:
    """Count values in 2 x 2048 bins over [-limit, limit]; the limit doubles, merging bins, when values pass it."""

    limit: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))

    def add(self, values: NDArray[np.float32], magnitude: float) -> None:
        """Count values whose largest magnitude is given."""
        if self.limit == 0.0:
            self.limit = 2.0 ** np.ceil(np.log2(max(magnitude, 1e-30)))
        while magnitude > self.limit:
            middle = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([np.zeros(BINS // 2, np.int64), middle, np.zeros(BINS // 2, np.int64)])
            self.limit *= 2.0
        codes = (values.reshape(-1) * np.float32(BINS / self.limit) + np.float32(BINS)).astype(np.int32)
        np.minimum(codes, 2 * BINS - 1, out=codes)
        self.counts += np.bincount(codes, minlength=2 * BINS)


@dataclass
class Statistics:
    """Hold what is kept of one tensor.

    Attributes:
        minimum: float32[channels], smallest value per channel (last axis).
        maximum: float32[channels], largest value per channel.
        histogram: of all values, when asked for.
        mean: float32[channels], mean over tokens, when asked for; with a moment, over the same tokens.
        moment: float32[channels, channels], mean of x xᵀ over tokens, when asked for.
        seen: tokens so far.
        rows: tokens that entered the moment, evenly spread over those seen.
        waiting: rows that have not entered it yet.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    histogram: Histogram | None = None
    moment: NDArray[np.float32] | None = None
    mean: NDArray[np.float32] | None = None
    seen: int = 0
    rows: int = 0
    waiting: list[NDArray[np.float32]] = field(default_factory=list, repr=False)


def equal_length_batches(samples: Samples, longest: int) -> list[Batch]:
    """Batch texts of exactly the same length, so that no padding exists that could enter a statistic.

    No batch holds more tokens than the longest text alone, so memory does not grow with the number of texts.
    """
    return samples.unpadded(longest)


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Sequence[Batch],
    progress: Callable[[int, int], None],
    histograms: Iterable[str] = (),
    moments: Iterable[str] = (),
    means: Iterable[str] = (),
) -> dict[str, Statistics]:
    """Run the model over the batches and keep statistics of the named tensors.

    Args:
        model: FP32 ONNX.
        tensors: names to keep minimum and maximum of, per channel.
        batches: without padding, see `equal_length_batches`.
        progress: called with (done, total) after each batch.
        histograms: names to keep a histogram of.
        moments: names to keep a second moment and a mean of.
        means: names to keep the mean of only, each a tensor of tokens.

    Raises:
        EdgeqError: a tensor held NaN or infinity.
    """
    inputs = [name for name in tensors if name in {item.name for item in model.graph.input}]
    made = [name for name in tensors if name not in inputs]
    session = observing(model, made)
    with_histogram, with_moment, with_mean = set(histograms), set(moments), set(means)
    count = sum(batch.feeds.size for batch in batches)
    kept: dict[str, Statistics] = {}
    for done, batch in enumerate(batches, start=1):
        given = batch.feeds.named(session.inputs) if inputs else {}
        arrays = [*(given[name] for name in inputs), *(session.run(made, batch.feeds) if made else ())]
        for name, array in zip([*inputs, *made], arrays, strict=True):
            rows = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)
            total = count * max(1, len(rows) // batch.feeds.size)  # an image has many rows, a token one
            low, high = rows.min(0), rows.max(0)
            if array.ndim == 4:  # attention: the last axis is a position, no channel
                low, high = low.min(keepdims=True), high.max(keepdims=True)
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise EdgeqError(
                    f"{name}: FP32 gave NaN or infinity on the calibration texts; the float model is broken"
                )
            statistics = kept.get(name)
            if statistics is None:
                statistics = kept[name] = Statistics(low, high, Histogram() if name in with_histogram else None)
            else:
                np.minimum(statistics.minimum, low, out=statistics.minimum)
                np.maximum(statistics.maximum, high, out=statistics.maximum)
            if statistics.histogram is not None:
                statistics.histogram.add(array, float(max(-low.min(), high.max())))
            if name in with_mean:
                share = rows.sum(0) / np.float32(total)
                statistics.mean = share if statistics.mean is None else statistics.mean + share
            if name in with_moment:
                _add_moment(statistics, rows, max(1, total // MOMENT_ROWS))
        progress(done, len(batches))
    return {name: _mean_moment(statistics) for name, statistics in kept.items()}


def observing(model: onnx.ModelProto, tensors: Sequence[str]) -> FloatSession:
    """Load the model with the tensors as outputs; what only the sentence embedding needs is not run."""
    have = {output.name for output in model.graph.output}
    extra = [name for name in tensors if name not in have]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    try:
        return FloatSession.of(model)
    finally:
        del model.graph.output[len(have) :]


def _add_moment(statistics: Statistics, rows: NDArray[np.float32], stride: int) -> None:
    """Gather rows and multiply them in blocks: one large product costs far less than many small ones."""
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


def _mean_moment(statistics: Statistics) -> Statistics:
    _flush_moment(statistics)
    if statistics.moment is not None and statistics.mean is not None:
        statistics.moment /= statistics.rows
        statistics.mean /= statistics.rows
    return statistics
