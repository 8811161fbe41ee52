"""Measure an artifact's float32 vectors against FP32's: cosine, neighbour overlap, Spearman, norms, invariance.

`measure` and `invariance` compute figures and know no limits; `edgeq.evaluation.gate` holds the figures against the
limits. `report` does both and puts the result into a `ParityReport`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.data.batches import Samples
from edgeq.data.sessions import unit
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import Feeds, Tokens, bucket_lengths
from edgeq.errors import ConfigError, ParityFailed
from edgeq.evaluation.gate import judge, judge_end_to_end, judge_placement, judge_settings
from edgeq.records import EndToEnd, ImageSet, Measures, ParityReport, Placement, RunKind, SettingReport, Target, TextSet
from edgeq.system.host import describe

if TYPE_CHECKING:
    from edgeq.data.sessions import Session

_NEIGHBOURS = 10
MIN_TEXTS = 3  # two texts have one similarity, which cannot be ranked
_WORST_TEXT_CHARS = 80
_INVARIANCE_TEXTS, _SLOW_INVARIANCE_TEXTS = 8, 3
_UNIT_TOLERANCE = 1e-4
_BLOCK_ROWS = 512
_RANKED_TEXTS = 3000  # 4.5 million pairs; more take gigabytes and do not change the correlation

NOT_COMPARED = EndToEnd(status="not compared", reason="nothing was given to compare with")
FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]


def measure(reference: FloatArray, embeddings: FloatArray, texts: Sequence[str], invariance_min: float) -> Measures:
    """Compare an artifact's float32 vectors with FP32's, row by row and by their neighbours.

    Top-10 overlap compares, as sets, the ten nearest other texts of each text by cosine (all others, where there are
    fewer). Spearman correlates the cosines of all pairs of texts (of 3,000 evenly spaced texts, where there are more).
    The norm error is relative to FP32's own norm, because not every model normalises.

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
    norms, own_norms = (np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (reference, embeddings))
    if not norms.all():
        raise ParityFailed(
            f"text {int(np.argmin(norms)) + 1}: FP32's vector is zero, so nothing can be compared with it. "
            "Leave the text out, or check the model."
        )
    expected, found = unit(reference), unit(embeddings)
    cosines = np.clip(np.sum(expected * found, axis=1), -1.0, 1.0)
    return Measures(
        texts=len(texts),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        max_abs_error=float(np.abs(reference.astype(np.float64) - embeddings).max()),
        top10_overlap=overlap(_neighbours(expected), _neighbours(found)),
        spearman=_similarity_correlation(expected, found),
        invariance_min=invariance_min,
        norm_error_max=float(np.abs(own_norms / norms - 1.0).max()),
        is_normalized=bool(np.abs(norms - 1.0).max() < _UNIT_TOLERANCE),
        worst_text=texts[int(np.argmin(cosines))][:_WORST_TEXT_CHARS],
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
) -> ParityReport:
    """Measure vectors, judge the measures, and report; vectors that cannot be measured fail without measures.

    Raises:
        ConfigError: fewer than three texts.
    """
    measures: Measures | None = None
    try:
        measures = measure(reference, embeddings, texts, invariance_min)
        failures = judge(measures, placement, target.gate, ran_on)
    except ParityFailed as error:
        failures = (str(error),)
    failures += judge_settings(other_settings, target.gate) + judge_end_to_end(end_to_end)
    return ParityReport(
        target=target.name,
        ran_on=ran_on,
        machine=describe(),
        status="failed" if failures else "passed",
        measures=measures,
        gate=target.gate,
        failures=failures,
        texts=text_set,
        other_settings=other_settings,
        end_to_end=end_to_end,
    )


def not_run(
    target: Target,
    placement: Placement,
    text_set: TextSet | ImageSet,
    reason: str,
    other_settings: tuple[SettingReport, ...] = (),
    end_to_end: EndToEnd = NOT_COMPARED,
) -> ParityReport:
    """Report an artifact that was not run, with the reason; its placement and other settings are judged."""
    failures = judge_placement(placement, target.gate) + judge_settings(other_settings, target.gate)
    failures += judge_end_to_end(end_to_end)
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


def rank_correlation(first: DoubleArray, second: DoubleArray) -> float:
    """Give Spearman's rank correlation of two float64[n]; ties share their mean rank.

    Returns:
        In [-1, 1]; 0.0 where one side is constant.
    """
    ranks = [_ranks(values) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = float(np.sqrt(np.sum(centred[0] ** 2) * np.sum(centred[1] ** 2)))
    return float(np.clip(np.sum(centred[0] * centred[1]) / scale, -1.0, 1.0)) if scale > 0.0 else 0.0


def overlap(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Give the mean ratio of entries that each row of two int64[rows, k] has in common, whatever their order."""
    shared = [len(np.intersect1d(a, b)) for a, b in zip(first, second, strict=True)]
    return float(np.mean(shared) / first.shape[1])


def _check_comparable(reference: FloatArray, embeddings: FloatArray, count: int) -> None:
    """Refuse too few texts, vectors of another shape than FP32's, and NaN or infinity on either side."""
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


def _neighbours(rows: DoubleArray) -> NDArray[np.int64]:
    """Give the nearest other rows of each unit row by cosine, int64[rows, min(10, rows - 1)], unordered."""
    count = len(rows)
    nearest = min(_NEIGHBOURS, count - 1)
    found = np.empty((count, nearest), np.int64)
    for start in range(0, count, _BLOCK_ROWS):
        similarities = rows[start : start + _BLOCK_ROWS] @ rows.T
        here = np.arange(len(similarities))
        similarities[here, start + here] = -np.inf
        found[start : start + _BLOCK_ROWS] = np.argpartition(-similarities, nearest - 1, axis=1)[:, :nearest]
    return found


def _similarity_correlation(expected: DoubleArray, found: DoubleArray) -> float:
    """Give Spearman's correlation of the cosines of all pairs of rows, of at most 3,000 evenly spaced rows."""
    chosen = evenly_spaced(len(expected), _RANKED_TEXTS)
    upper = np.triu_indices(len(chosen), k=1)
    return rank_correlation(*((rows[chosen] @ rows[chosen].T)[upper] for rows in (expected, found)))


def _ranks(values: DoubleArray) -> DoubleArray:
    """Rank from 1, ties sharing the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: DoubleArray = (last - (counts - 1) / 2.0)[inverse]
    return ranks


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
