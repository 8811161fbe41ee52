"""Observe a float model on texts: find the migration strength, equalise, and keep the statistics once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from edgeq.errors import ConfigError, EdgeqError
from edgeq.graph import external_data
from edgeq.graph.edit import constant, dims, readers
from edgeq.graph.float_session import FloatSession
from edgeq.graph.linear import feed_forwards, sites, value_sum
from edgeq.quantization.convolution import map_tensors
from edgeq.quantization.quantize import quantize
from edgeq.quantization.rewrites.decompose import DECOMPOSE, has_derived_statistics
from edgeq.quantization.rewrites.observe_row_maxima import observe_row_maxima
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import Migration

Progress = Callable[[str, int, int], None]
SamplesT = TypeVar("SamplesT", bound=Samples)

# Activations have no strength: most of their channels are quiet in any set of texts, and one that was blown up for it
# clips at the first text that wakes it. Their large neurons move to the side path instead.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "norm": (0.8, 0.65, 0.9),
    "context": (0.8, 0.5),
}
SEARCH_SCHEME = "w8a8-gemm"  # the strength serves every scheme; this one quantises what all of them quantise
HELD_BACK_SHARE = 8  # one calibration text in so many judges the strength and is never observed
HELD_BACK_MOST = 48
TOLERANCE = 1e-5
_OBSERVED = frozenset(
    "Add Gelu MatMul Mul Reciprocal ReduceMax ReduceMean ReduceSumSquare Relu Sigmoid Sub Tanh".split()
)


@dataclass(frozen=True)
class Observed:
    """Hold what calibrating gives: the equalised model, the statistics of its tensors, and how strength was chosen."""

    model: onnx.ModelProto
    statistics: dict[str, Statistics]
    migration: Migration
    max_abs_error: float  # of the equalised model's embeddings against the float model's


def calibrate(model: onnx.ModelProto, samples: Samples, seed: int, progress: Progress) -> Observed:
    """Equalise a float model and observe it once.

    Args:
        model: FP32 ONNX in the dialect; not changed.
        samples: the calibration texts as tokens, or images; at least 16.
        seed: of the choice of texts that are held back to judge the strength.
        progress: called with (step, done, total).

    Raises:
        ConfigError: too few texts.
        EdgeqError: FP32 gives NaN or infinity.
    """
    if len(samples) < FEWEST_CALIBRATION:
        raise ConfigError(
            f"{len(samples)} calibration texts; at least {FEWEST_CALIBRATION} are needed: give more with --texts"
        )
    seen, held = _hold_back(samples, seed)
    longest = samples.longest
    batches = equal_length_batches(seen, longest)
    graph = ir.from_proto(model)
    wanted = [site.name for site in sites(graph.graph)]
    hidden = [str(block.hidden.name) for block in feed_forwards(graph.graph)]
    maps = map_tensors(graph.graph)
    first_names = list(dict.fromkeys([*wanted, *hidden, *smooth_scales.score_tensors(graph.graph), *maps]))
    first = observe(model, first_names, batches, lambda done, total: progress("observe", done, total))
    split = ir.from_proto(model)
    sweep = equal_length_batches(samples.swept(_vocabulary(graph.graph), seed), longest)
    swept = observe(
        model, list(dict.fromkeys([*wanted, *hidden])), sweep, lambda done, total: progress("sweep", done, total)
    )
    statistics = outlier_neurons.split_neurons(split.graph, first, swept)
    smooth_scales.size_mask(split.graph, first)
    parted = ir.to_proto(split)
    del graph, split  # each holds the weights once more
    migration = _search(model, parted, statistics, swept, held, longest, progress)
    equalized = ir.from_proto(parted)
    smooth_scales.migrate(equalized.graph, statistics, swept, migration.strengths)
    proto = ir.to_proto(equalized)
    read = [site.name for site in sites(equalized.graph)]
    for rewrite in (*DECOMPOSE, observe_row_maxima):
        rewrite(equalized)
    tensors = list(dict.fromkeys([*_float_tensors(equalized.graph, read), *maps]))
    expanded = ir.to_proto(equalized)
    del parted, equalized
    kept = observe(
        expanded, tensors, batches, lambda done, total: progress("calibrate", done, total),
        histograms=[*read, *maps], moments=read, means=_read_by_attention(expanded),
    )  # fmt: skip
    return Observed(proto, kept, migration, _largest_error(model, proto, held, longest))


def _vocabulary(graph: ir.Graph) -> int:
    """Give the rows of the table that tokens are looked up in; 0 where there is none."""
    return max(
        (
            len(table)
            for node in graph
            if node.op_type == "Gather" and (table := constant(node.inputs[0])) is not None
            and node.inputs[1] is not None and node.inputs[1].name == "input_ids"
        ),
        default=0,
    )  # fmt: skip


def _largest_error(before: onnx.ModelProto, after: onnx.ModelProto, held: Samples, longest: int) -> float:
    """Prove that equalising kept the FP32 function, on texts that were not observed.

    Raises:
        EdgeqError: an embedding moved by more than 1e-5 of the largest value.
    """
    batches = equal_length_batches(held, longest)
    old, new = (embed_batches(FloatSession.of(model), batches, len(held)) for model in (before, after))
    error = float(np.abs(old - new).max()) / max(1.0, float(np.abs(old).max()))
    if not error <= TOLERANCE:
        raise EdgeqError(
            f"equalising moved the FP32 embeddings by {error:.2e}; at most {TOLERANCE:.0e} is allowed: "
            "please report the model"
        )
    return error


def _float_tensors(graph: ir.Graph, read: list[str]) -> list[str]:
    """Name what is kept: the tensors that products read, and what schemes that leave nothing float need besides.

    What follows exactly from another tensor is left out, and so is what is made of the mask alone.
    """
    mask = {value for value in graph.inputs if value.name == "attention_mask"}
    positions: set[ir.Value] = set()
    others = []
    for node in graph:
        variable = [value for value in node.inputs if value is not None and constant(value) is None]
        if node.op_type == "Shape" or (variable and all(value in positions for value in variable)):
            positions.update(node.outputs)
        elif variable and all(value in mask or value in positions for value in variable):
            mask.update(node.outputs)
        else:
            others += [str(value.name) for value in variable if value in positions and _has_channels(value)]
            if node.op_type == "Gather" and any(use.op_type != "Add" for use in readers(node.outputs[0])):
                others += [str(value.name) for value in node.outputs if _is_real(value) and value.name not in read]
            if node.op_type in _OBSERVED and not has_derived_statistics(node) and _is_real(node.outputs[0]):
                others += [str(value.name) for value in node.outputs if value.name not in read]
    return [*read, *dict.fromkeys(others)]


def _has_channels(value: ir.Value) -> bool:
    """Tell whether a tensor of positions has statistics: its last axis does not grow, or it is one of attention."""
    shape = dims(value)
    return _is_real(value) and shape is not None and bool(shape) and (len(shape) == 4 or isinstance(shape[-1], int))


def _is_real(value: ir.Value) -> bool:
    return value.dtype in (None, ir.DataType.FLOAT)


def _read_by_attention(model: onnx.ModelProto) -> list[str]:
    """Name the values that attention mixes, as their products make them."""
    graph = ir.from_proto(model).graph
    return [str(values.outputs[0].name) for site in sites(graph) if (values := value_sum(site)) is not None]


def _hold_back(samples: SamplesT, seed: int) -> tuple[SamplesT, SamplesT]:
    count = min(HELD_BACK_MOST, max(4, len(samples) // HELD_BACK_SHARE))
    held = set(np.random.default_rng(seed).choice(len(samples), count, replace=False).tolist())
    parts = [[row for row in range(len(samples)) if (row in held) is keep] for keep in (False, True)]
    return samples.chosen(parts[0]), samples.chosen(parts[1])


def _search(
    model: onnx.ModelProto,
    split: onnx.ModelProto,
    statistics: Mapping[str, Statistics],
    swept: Mapping[str, Statistics],
    held: Samples,
    longest: int,
    progress: Progress,
) -> Migration:
    """Try strengths one kind after the other, judged on the embeddings of texts that were not observed.

    A tensor's own error overfits: an evenly scaled tensor clips every channel that a new text drives past its observed
    maximum. Half the score is the mean cosine, half that of the worst tenth: a mean hides the text that is lost.
    """
    batches = equal_length_batches(held, longest)
    reference = embed_batches(FloatSession.of(model), batches, len(held))
    best = {kind: choices[0] for kind, choices in STRENGTHS.items()}
    kinds = {site.kind for site in sites(ir.from_proto(split).graph)}
    plan = [(kind, choice) for kind in STRENGTHS if kind in kinds for choice in STRENGTHS[kind][1:]]
    with external_data.passing():
        best_score, best_mean = _score(split, statistics, swept, best, batches, reference)
    for done, (kind, choice) in enumerate(plan, start=1):
        candidate = {**best, kind: choice}
        with external_data.passing():
            score, mean = _score(split, statistics, swept, candidate, batches, reference)
        if score > best_score:
            best, best_score, best_mean = candidate, score, mean
        progress("equalize", done, len(plan))
    return Migration(strengths=best, cosine_mean=best_mean, candidates=len(plan) + 1)


def _score(
    split: onnx.ModelProto,
    statistics: Mapping[str, Statistics],
    swept: Mapping[str, Statistics],
    strengths: Mapping[str, float],
    batches: list[Batch],
    reference: Embeddings,
) -> tuple[float, float]:
    graph = ir.from_proto(split)
    moved = smooth_scales.migrate(graph.graph, statistics, swept, strengths)
    candidate = quantize(ir.to_proto(graph), {**statistics, **moved}, SCHEMES[SEARCH_SCHEME], compensate=False)[0]
    cosines = np.sort(_cosines(reference, embed_batches(FloatSession.of(candidate), batches, len(reference))))
    if not np.isfinite(cosines).all():
        return -1.0, -1.0
    worst = cosines[: max(1, len(cosines) // 10)]
    return float(cosines.mean() + worst.mean()) / 2.0, float(cosines.mean())


def _cosines(first: Embeddings, second: Embeddings) -> NDArray[np.float64]:
    a, b = first.astype(np.float64), second.astype(np.float64)
    cosines: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosines
