"""Calibrate a float model: move outlier neurons, smooth scales (SmoothQuant), and observe every tensor once.

How much of a tensor's scale moves into weights (SmoothQuant's alpha) is searched for on texts that are not observed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration import outlier_neurons, smooth_scales
from edgeq.calibration.observe import equal_length_batches, observe
from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import Batch, Samples
from edgeq.data.plans import FEWEST_CALIBRATION
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.errors import ConfigError
from edgeq.graph import external_data, operators
from edgeq.graph.dataflow import mask_values, shape_values
from edgeq.graph.edit import constant, dims, readers
from edgeq.graph.float_session import FloatSession
from edgeq.graph.linear import feed_forwards, sites, value_projection
from edgeq.pipeline.equalizing_error import equalizing_error
from edgeq.quantization.convolution import kernel_inputs, map_tensors
from edgeq.quantization.mixed import quantize_mixed
from edgeq.quantization.rewrites.decompose import DECOMPOSE, has_derived_statistics
from edgeq.quantization.rewrites.observe_row_maxima import observe_row_maxima
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import Smoothing
from edgeq.system import memory
from edgeq.system.progress import Progress, silent

SamplesT = TypeVar("SamplesT", bound=Samples)

# By what makes the tensor. GELU outputs are not smoothed: a channel near zero on the calibration texts would get a
# large scale, and clip on the first text that activates it. Their outlier neurons move to a branch of their own.
ALPHAS: dict[str, tuple[float, ...]] = {
    "norm": (0.8, 0.65, 0.9),
    "context": (0.8, 0.5),
}
SEARCH_SCHEME = "w8a8-gemm"  # alpha serves every scheme; this one quantises what all of them quantise
HELD_BACK_RATIO = 8  # one calibration text in so many judges alpha and is never observed
HELD_BACK_MOST = 48


@dataclass(frozen=True)
class Observed:
    """Hold what calibrating gives: the equalised model, the statistics of its tensors, and how alpha was chosen."""

    model: onnx.ModelProto
    statistics: dict[str, Statistics]
    smoothing: Smoothing
    max_abs_error: float  # of the equalised model's embeddings against the float model's


def calibrate(model: onnx.ModelProto, samples: Samples, seed: int, progress: Progress) -> Observed:
    """Equalise a float model, exactly in FP32, and observe its tensors once.

    Args:
        model: FP32 ONNX in the dialect; not changed.
        samples: the calibration texts as tokens, or images; at least 16.
        seed: of the choice of texts that are held back to judge alpha.
        progress: called with (step, done, total).

    Raises:
        ConfigError: too few texts.
        EdgeqError: FP32 gives NaN or infinity, or equalising changed the embeddings.
    """
    if len(samples) < FEWEST_CALIBRATION:
        raise ConfigError(
            f"{len(samples)} calibration texts; at least {FEWEST_CALIBRATION} are needed: give more with --texts"
        )
    seen, held = _hold_back(samples, seed)
    batches = equal_length_batches(seen, samples.longest)
    split = _split(model, samples, batches, seed, progress)
    judging = equal_length_batches(held, samples.longest)
    reference = embed_batches(FloatSession.of(model), judging, len(held))
    smoothing = _search(split, judging, reference, progress)
    equalized = _equalize(split, smoothing.alphas)
    del split  # it holds the weights once more
    memory.trim()
    made, kept = _observe_all(equalized, batches, progress)
    memory.trim()
    error = equalizing_error(model, made, judging, reference)
    return Observed(made, kept, smoothing, error)


def calibrate_on_probes(model: onnx.ModelProto, samples: Samples) -> tuple[onnx.ModelProto, dict[str, Statistics]]:
    """Equalise and observe a float model on a few random samples, to see which rewrites and operators it meets.

    The ranges mean nothing: alpha is not searched for, and no sample is held back.

    Args:
        model: FP32 ONNX in the dialect; not changed.
        samples: see `random_texts` and `random_images`.

    Returns:
        The equalised model and the statistics of its tensors.

    Raises:
        EdgeqError: FP32 gives NaN or infinity.
    """
    batches = equal_length_batches(samples, samples.longest)
    split = _split(model, samples, batches, 0, silent, has_sweep=False)
    equalized = _equalize(split, {kind: choices[0] for kind, choices in ALPHAS.items()})
    return _observe_all(equalized, batches, silent, has_moments=False)


@dataclass(frozen=True)
class _Split:
    """Hold a model whose outlier neurons stand in branches of their own, with the statistics of what is smoothed.

    Attributes:
        model: FP32 ONNX.
        statistics: of the tensors that weight products read, on the samples.
        swept: of the same tensors, on a sweep through the vocabulary.
        maps: the tensors that convolutions read and give.
    """

    model: onnx.ModelProto
    statistics: Mapping[str, Statistics]
    swept: Mapping[str, Statistics]
    maps: tuple[str, ...]


@dataclass(frozen=True)
class _Equalized:
    """Hold an equalised model, the same with its norms decomposed, and the tensors to observe in that.

    Attributes:
        model: FP32 ONNX.
        expanded: the same function, norms decomposed.
        read: the tensors that weight products read, which need histograms and second moments.
        others: the other tensors that quantisers need statistics of.
        maps: the tensors that convolutions read and give.
    """

    model: onnx.ModelProto
    expanded: onnx.ModelProto
    read: tuple[str, ...]
    others: tuple[str, ...]
    maps: tuple[str, ...]


def _split(
    model: onnx.ModelProto,
    samples: Samples,
    batches: Sequence[Batch],
    seed: int,
    progress: Progress,
    has_sweep: bool = True,
) -> _Split:
    """Observe what is smoothed, on samples and a sweep through the vocabulary; give outlier neurons their branches.

    Without a sweep through the vocabulary the samples stand in for it: it takes longer than they do.
    """
    graph = ir.from_proto(model).graph
    wanted = [site.name for site in sites(graph)]
    hidden = [str(block.hidden.name) for block in feed_forwards(graph)]
    maps = map_tensors(graph)
    first_names = list(dict.fromkeys([*wanted, *hidden, *maps]))
    first = observe(model, first_names, batches, lambda done, total: progress("observe", done, total))
    swept = first
    if has_sweep:
        sweep = equal_length_batches(samples.swept(_vocabulary(graph), seed), samples.longest)
        swept = observe(
            model, list(dict.fromkeys([*wanted, *hidden])), sweep, lambda done, total: progress("sweep", done, total)
        )
    split = ir.from_proto(model)
    statistics = outlier_neurons.split_neurons(split.graph, first, swept)
    return _Split(ir.to_proto(split), statistics, swept, tuple(maps))


def _equalize(split: _Split, alphas: Mapping[str, float]) -> _Equalized:
    """Smooth a model (SmoothQuant) with these alphas, and decompose its norms in a copy."""
    equalized = ir.from_proto(split.model)
    smooth_scales.smooth(equalized.graph, split.statistics, split.swept, alphas)
    proto = ir.to_proto(equalized)
    read = [site.name for site in sites(equalized.graph)]
    for rewrite in (*DECOMPOSE, observe_row_maxima):
        rewrite(equalized)
    others = _float_tensors(equalized.graph, read)
    return _Equalized(proto, ir.to_proto(equalized), tuple(read), tuple(others), split.maps)


def _observe_all(
    equalized: _Equalized, batches: Sequence[Batch], progress: Progress, has_moments: bool = True
) -> tuple[onnx.ModelProto, dict[str, Statistics]]:
    """Observe every tensor that a quantiser needs statistics of, and give the attention mask its size.

    Without padding the mask is 0, whatever its size: so the scores that decide it are observed in the same run.

    Args:
        equalized: the model.
        batches: of the samples.
        progress: see `calibrate`.
        has_moments: observe second moments, too; they serve the rounding of weights alone.

    Returns:
        The model with its mask, and the statistics.
    """
    names = list(dict.fromkeys([*equalized.others, *equalized.maps]))
    graph = ir.from_proto(equalized.model)
    scores = smooth_scales.score_tensors(graph.graph)
    kernels, pointwise = kernel_inputs(graph.graph)
    if has_moments:
        kernels = [name for name in kernels if name not in pointwise]  # a moment comes with its mean
    found = observe(
        equalized.expanded, list(dict.fromkeys([*names, *scores])), batches,
        lambda done, total: progress("calibrate", done, total),
        histograms=[*equalized.read, *equalized.maps], 
        moments=[*equalized.read, *pointwise] if has_moments else (),
        means=[*_read_by_attention(ir.from_proto(equalized.expanded).graph), *kernels],
    )  # fmt: skip
    smooth_scales.size_mask(graph.graph, found)
    return ir.to_proto(graph), {name: found[name] for name in names}


def decomposed(model: onnx.ModelProto) -> tuple[ir.Model, list[str], list[str]]:
    """Give a float model with its norms decomposed, and the tensors that quantisers need statistics of, once each.

    Args:
        model: FP32 ONNX; not changed.

    Returns:
        The same function in other operators; the tensors in order; those whose mean is needed, too.
    """
    expanded = ir.from_proto(model)
    read = [site.name for site in sites(expanded.graph)]
    maps = map_tensors(expanded.graph)
    for rewrite in (*DECOMPOSE, observe_row_maxima):
        rewrite(expanded)
    others = _float_tensors(expanded.graph, read)
    return expanded, list(dict.fromkeys([*others, *maps])), _read_by_attention(expanded.graph)


def _vocabulary(graph: ir.Graph) -> int:
    """Count the rows of the embedding table; 0 where there is none."""
    return max(
        (
            len(table)
            for node in graph
            if node.op_type == "Gather" and (table := constant(node.inputs[0])) is not None
            and node.inputs[1] is not None and node.inputs[1].name == "input_ids"
        ),
        default=0,
    )  # fmt: skip


def _float_tensors(graph: ir.Graph, read: list[str]) -> list[str]:
    """Name the tensors to observe: those that products read, and what schemes that leave nothing float need besides.

    A tensor whose statistics follow exactly from another's is left out, and so is what follows from the mask.
    """
    mask, positions = mask_values(graph), shape_values(graph)
    others = []
    for node in graph:
        if node.outputs[0] not in mask and node.outputs[0] not in positions:
            others += [str(value.name) for value in node.inputs if value in positions and _has_channels(value)]
            if node.op_type == "Gather" and any(use.op_type != "Add" for use in readers(node.outputs[0])):
                others += [str(value.name) for value in node.outputs if _is_real(value) and value.name not in read]
            if node.op_type in operators.OBSERVED and not has_derived_statistics(node) and _is_real(node.outputs[0]):
                others += [str(value.name) for value in node.outputs if value.name not in read]
    return [*read, *dict.fromkeys(others)]


def _has_channels(value: ir.Value) -> bool:
    """Tell whether a tensor that follows from sizes can be observed: its last axis is fixed, or it has four axes."""
    shape = dims(value)
    return _is_real(value) and shape is not None and bool(shape) and (len(shape) == 4 or isinstance(shape[-1], int))


def _is_real(value: ir.Value) -> bool:
    return value.dtype in (None, ir.DataType.FLOAT)


def _read_by_attention(graph: ir.Graph) -> list[str]:
    """Name the outputs of the value projections."""
    return [str(values.output.name) for site in sites(graph) if (values := value_projection(site)) is not None]


def _hold_back(samples: SamplesT, seed: int) -> tuple[SamplesT, SamplesT]:
    count = min(HELD_BACK_MOST, max(4, len(samples) // HELD_BACK_RATIO))
    held = set(np.random.default_rng(seed).choice(len(samples), count, replace=False).tolist())
    parts = [[row for row in range(len(samples)) if (row in held) is keep] for keep in (False, True)]
    return samples.chosen(parts[0]), samples.chosen(parts[1])


def _search(split: _Split, batches: list[Batch], reference: Embeddings, progress: Progress) -> Smoothing:
    """Search SmoothQuant's alpha for each maker of tensors in turn, on the embeddings of texts that were not observed.

    The rounding error of the tensors themselves would overfit: a tensor whose channels all fill the range clips on
    every new text that passes an observed maximum. Half the score is the mean cosine, half that of the worst tenth: a
    mean hides a single bad text.
    """
    best = {maker: choices[0] for maker, choices in ALPHAS.items()}
    makers = {site.maker for site in sites(ir.from_proto(split.model).graph)}
    plan = [(maker, alpha) for maker in ALPHAS if maker in makers for alpha in ALPHAS[maker][1:]]
    with external_data.passing():
        best_score, best_mean = _score(split, best, batches, reference)
    for done, (maker, alpha) in enumerate(plan, start=1):
        candidate = {**best, maker: alpha}
        with external_data.passing():
            score, mean = _score(split, candidate, batches, reference)
        if score > best_score:
            best, best_score, best_mean = candidate, score, mean
        progress("equalize", done, len(plan))
    return Smoothing(alphas=best, cosine_mean=best_mean, candidates=len(plan) + 1)


def _score(
    split: _Split, alphas: Mapping[str, float], batches: list[Batch], reference: Embeddings
) -> tuple[float, float]:
    graph = ir.from_proto(split.model)
    moved = smooth_scales.smooth(graph.graph, split.statistics, split.swept, alphas)
    observed, scheme = {**split.statistics, **moved}, SCHEMES[SEARCH_SCHEME]
    candidate = quantize_mixed(ir.to_proto(graph), observed, scheme, compensate=False, has_tables=False)[0]
    cosines = np.sort(_cosines(reference, embed_batches(FloatSession.of(candidate), batches, len(reference))))
    if not np.isfinite(cosines).all():
        return -1.0, -1.0
    worst = cosines[: max(1, len(cosines) // 10)]
    return float(cosines.mean() + worst.mean()) / 2.0, float(cosines.mean())


def _cosines(first: Embeddings, second: Embeddings) -> NDArray[np.float64]:
    a, b = first.astype(np.float64), second.astype(np.float64)
    cosines: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosines
