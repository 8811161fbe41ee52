"""Measure an artifact's float32 vectors against FP32's: centred cosine, regret, Spearman, norms, invariance.

`measure` and `invariance` compute figures and know no limits; `edgeq.evaluation.gate` holds the figures against the
limits. `report` does both and puts the result into a `ParityReport`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.data.batches import Samples
from edgeq.data.sessions import unit
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import Feeds, Tokens, bucket_lengths
from edgeq.errors import ConfigError, ParityFailed
from edgeq.evaluation import vector_measures
from edgeq.evaluation.gate import fewest_samples, judge_end_to_end, judge_placement, judge_report, judge_settings
from edgeq.records import (
    EndToEnd,
    Exactness,
    ImageSet,
    Measures,
    ParityReport,
    Placement,
    RunKind,
    SettingReport,
    Target,
    TextSet,
)
from edgeq.system.host import describe

if TYPE_CHECKING:
    from edgeq.data.sessions import Session

MIN_TEXTS = 3  # two texts have one similarity, which cannot be ranked
_WORST_TEXT_CHARS = 80
_INVARIANCE_TEXTS, _SLOW_INVARIANCE_TEXTS = 8, 3

NOT_COMPARED = EndToEnd(status="not compared", reason="nothing was given to compare with")
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class OwnVectors:
    """Hold the artifact's vectors of those texts that it ran, float32[rows, dim]; `rows` are positions in the set."""

    rows: tuple[int, ...]
    embeddings: FloatArray


def measure(reference: FloatArray, embeddings: FloatArray, texts: Sequence[str], invariance_min: float) -> Measures:
    """Compare an artifact's float32 vectors with FP32's, row by row and by their neighbours.

    Mean-centred cosine, regret@10 and its intervals: see `edgeq.evaluation.vector_measures`. The ten nearest are found
    among all the texts (all others, where there are fewer). The norm error is relative to FP32's own norm, because not
    every model normalises.

    Args:
        reference: float32[texts, dim], FP32's vectors.
        embeddings: float32[texts, dim], the artifact's vectors for the same texts in the same order.
        texts: in the order of the rows.
        invariance_min: the result of `invariance`.

    Raises:
        ConfigError: fewer than three texts.
        ParityFailed: the vectors have another shape than FP32's, or hold NaN or infinity, or FP32's do.
    """
    _check_comparable(reference, embeddings, len(texts))
    worst = int(np.argmin(vector_measures.centred_cosines(reference, embeddings)))
    return Measures.model_validate(
        vector_measures.measured(reference, embeddings)
        | {"texts": len(texts), "invariance_min": invariance_min, "worst_text": texts[worst][:_WORST_TEXT_CHARS]}
    )


def invariance(
    session: Session,
    samples: Samples,
    max_sequence: int,
    buckets_tokens: Sequence[int] = (),
    parity_texts: int | None = None,
) -> float:
    """Give the smallest cosine between any two vectors of one text: alone, in batches, and at other paddings.

    Up to eight texts of evenly spaced lengths, the shortest and the longest included, run alone: unpadded, padded by 1
    and by 7 tokens, to the next power of two, and to the longest of them. They also run twice in one batch, and all in
    one batch in both orders. Images need no padding: they run alone and in batches.

    Args:
        session: the loaded artifact.
        samples: tokens of any texts, or images.
        max_sequence: the longest sequence the model takes.
        buckets_tokens: the lengths a static artifact takes; empty for dynamic shapes.
        parity_texts: the gate's limit on texts, set where one run takes seconds: then three texts run, not eight.

    Returns:
        A cosine; 0.0 where a vector is NaN, infinite or zero.

    Raises:
        ConfigError: there are no texts.
    """
    if not len(samples):
        raise ConfigError("invariance: no texts; at least one is needed. Give a text file that holds some.")
    if not isinstance(samples, Tokens):
        return _unpadded_invariance(session, samples)
    tokens = samples
    by_length = sorted(range(len(tokens.ids)), key=lambda row: (len(tokens.ids[row]), row))
    most = _INVARIANCE_TEXTS if parity_texts is None else _SLOW_INVARIANCE_TEXTS
    chosen = [tokens.ids[by_length[position]] for position in evenly_spaced(len(by_length), most)]
    sizes = list(bucket_lengths(buckets_tokens, max_sequence)) or list(range(1, max_sequence + 1))
    widest = _smallest(sizes, len(chosen[-1]))
    mixed = session(_padded(chosen, widest, tokens.pad_id))
    reverse = session(_padded(chosen[::-1], widest, tokens.pad_id))[::-1]
    smallest = 1.0
    for row, ids in enumerate(chosen):
        size = len(ids)
        asked = {size, size + 1, size + 7, 1 << size.bit_length(), widest}
        paddings = sorted({_smallest(sizes, width) for width in asked})
        vectors = [session(_padded([ids], width, tokens.pad_id))[0] for width in paddings]
        vectors.extend(session(_padded([ids, ids], paddings[0], tokens.pad_id)))
        smallest = min(smallest, _smallest_cosine(np.stack([*vectors, mixed[row], reverse[row]])))
    return smallest


def report(
    target: Target,
    ran_on: RunKind,
    placement: Placement,
    reference: FloatArray,
    embeddings: FloatArray,
    texts: Sequence[str],
    text_set: TextSet | ImageSet,
    invariance_min: float,
    other_settings: tuple[SettingReport, ...] = (),
    end_to_end: EndToEnd = NOT_COMPARED,
    own: OwnVectors | None = None,
) -> ParityReport:
    """Measure vectors, judge the measures, and report; vectors that cannot be measured fail without measures.

    Args:
        target: with the gate.
        ran_on: the kind of run that gave the artifact's vectors.
        placement: of the artifact.
        reference: float32[texts, dim], FP32's vectors.
        embeddings: float32[texts, dim], the artifact's, or where `own` is given those of the QDQ model.
        texts: in the order of the rows.
        text_set: their record.
        invariance_min: of the artifact.
        other_settings: the measures with other runtime settings.
        end_to_end: how the bundle's tokens compare with the source's own.
        own: the artifact's vectors of some of the texts, where `embeddings` are the QDQ model's.

    Raises:
        ConfigError: fewer than three texts.
    """
    found = ParityReport(
        target=target.name,
        ran_on=ran_on,
        machine=describe(),
        status="failed",
        measures=None,
        gate=target.gate,
        failures=(),
        texts=text_set,
        measured="artifact" if own is None else "qdq-model",
        other_settings=other_settings,
        end_to_end=end_to_end,
    )
    try:
        measures = measure(reference, embeddings, texts, invariance_min)
        exactness = None
        if own is not None:
            exactness, norm_error = _exactness(reference, embeddings, own)
            worse = max(norm_error, measures.norm_error_max)
            measures = measures.model_copy(update={"norm_error_max": worse})
        found = found.model_copy(update={"measures": measures, "exactness": exactness})
        failures = judge_report(found, placement)
    except ParityFailed as error:
        settings = judge_settings(other_settings, target.gate, fewest_samples(text_set))
        failures = (str(error), *settings, *judge_end_to_end(end_to_end))
    return found.model_copy(update={"failures": failures, "status": "failed" if failures else "passed"})


def _exactness(reference: FloatArray, qdq: FloatArray, own: OwnVectors) -> tuple[Exactness, float]:
    """Compare the artifact's own vectors with the QDQ model's; give its largest error of the norm against FP32, too.

    Raises:
        ParityFailed: they have another shape, or hold NaN or infinity.
    """
    rows = list(own.rows)
    _check_comparable(reference[rows], own.embeddings, len(rows))
    norms, found = (np.linalg.norm(each.astype(np.float64), axis=1) for each in (reference[rows], own.embeddings))
    exactness = Exactness.model_validate(vector_measures.exactness(qdq[rows], own.embeddings))
    return exactness, float(np.abs(found / norms - 1.0).max())


def not_run(
    target: Target,
    placement: Placement,
    text_set: TextSet | ImageSet,
    reason: str,
    other_settings: tuple[SettingReport, ...] = (),
    end_to_end: EndToEnd = NOT_COMPARED,
) -> ParityReport:
    """Report an artifact that was not run, with the reason; its placement and other settings are judged."""
    failures = judge_placement(placement, target.gate)
    failures += judge_settings(other_settings, target.gate, fewest_samples(text_set)) + judge_end_to_end(end_to_end)
    return ParityReport(
        target=target.name,
        ran_on="not-run",
        machine=describe(),
        status="failed" if failures else "not-run",
        measures=None,
        gate=target.gate,
        failures=failures,
        texts=text_set,
        reason=reason,
        other_settings=other_settings,
        end_to_end=end_to_end,
    )


def _check_comparable(reference: FloatArray, embeddings: FloatArray, count: int) -> None:
    """Refuse too few texts, other shapes, NaN or infinity on either side, and FP32 vectors of one direction."""
    if count < MIN_TEXTS:
        raise ConfigError(
            f"parity: {count} texts; at least {MIN_TEXTS} are needed to rank similarities. Give more texts."
        )
    if reference.ndim != 2 or reference.shape[0] != count:
        raise ParityFailed(f"FP32 gave vectors of shape {reference.shape} for {count} texts; [{count}, dim] is needed.")
    if embeddings.shape != reference.shape:
        raise ParityFailed(
            f"the artifact gave vectors of shape {embeddings.shape}; FP32's have {reference.shape}. "
            "Check the artifact's output with `edgeq inspect`."
        )
    for owner, vectors in (("FP32", reference), ("the artifact", embeddings)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if bad.size:
            raise ParityFailed(
                f"{owner} gave NaN or infinity for {bad.size} of {count} texts, first for text {int(bad[0]) + 1}; "
                "finite vectors are needed. Check the calibrated ranges and the mask."
            )
    norms = np.linalg.norm(reference.astype(np.float64), axis=1)
    if not norms.all():
        raise ParityFailed(
            f"text {int(np.argmin(norms)) + 1}: FP32's vector is zero, so nothing can be compared with it. "
            "Leave the text out, or check the model."
        )
    if vector_measures.is_constant(reference):
        raise ParityFailed(
            f"FP32 gives all {count} texts one direction, so nothing can be ranked. Give texts that differ, or check "
            "the model."
        )


def _smallest(lengths: Sequence[int], size: int) -> int:
    """Give the smallest of the lengths that holds `size` tokens, or the longest of them."""
    return next((length for length in lengths if length >= size), lengths[-1])


def _unpadded_invariance(session: Session, samples: Samples) -> float:
    """Give the smallest cosine between any two vectors of one image: alone, and in a batch in both orders."""
    some = samples.chosen(evenly_spaced(len(samples), _INVARIANCE_TEXTS))
    count = len(some)
    alone, together, reverse = (
        np.concatenate([session(batch.feeds) for batch in given.batches(size, size)])
        for given, size in ((some, 1), (some, count), (some.chosen(range(count)[::-1]), count))
    )
    rows = np.stack([alone, together, reverse[::-1]])
    return min(_smallest_cosine(rows[:, row]) for row in range(count))


def _padded(ids: Sequence[Sequence[int]], width: int, pad_id: int) -> Feeds:
    """Pad token ids to int64[texts, width], with their attention mask."""
    input_ids = np.full((len(ids), width), pad_id, np.int64)
    mask = np.zeros((len(ids), width), np.int64)
    for row, tokens in enumerate(ids):
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return Feeds(input_ids=input_ids, attention_mask=mask)


def _smallest_cosine(vectors: FloatArray) -> float:
    """Give the smallest cosine between any two rows; 0.0 where one is NaN, infinite or zero."""
    if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        return 0.0
    rows = unit(vectors)
    return float(min((rows @ rows.T).min(), 1.0))
