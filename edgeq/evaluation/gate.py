"""Judge parity measures against a target's gate: a missing measure or NaN meets no limit.

A mean passes where the worse end of its bootstrap interval meets the limit. Where only the mean itself does, the
sentence says `undecided: about N more texts`. A minimum, a percentile and Spearman have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from edgeq.data.plans import FEWEST_JUDGED_TEXTS, FEWEST_VALIDATION
from edgeq.records import (
    EndToEnd,
    Exactness,
    Gate,
    ImageSet,
    Measures,
    ParityReport,
    Placement,
    RunKind,
    SettingReport,
    TextSet,
)

FEWEST_TEXTS, FEWEST_IMAGES = FEWEST_JUDGED_TEXTS, FEWEST_VALIDATION  # that measures against FP32 are judged on
QDQ_MODEL, EXPORTING_MACHINE = "the QDQ model", "the exporting machine"
_MOST_FURTHER_TEXTS = 1_000_000  # beyond it the mean is the limit itself, for all that texts can tell


class _Limit(NamedTuple):
    """Hold a measure, the worse end of its interval (the measure itself, where it has none), and its limit.

    `is_floor` tells whether the limit is the least or the most that is allowed.
    """

    name: str
    value: float
    end: float
    limit: float
    is_floor: bool

    def is_met_by(self, value: float) -> bool:
        """Tell whether a value meets the limit; NaN does not."""
        return value >= self.limit if self.is_floor else value <= self.limit

    @property
    def is_undecided(self) -> bool:
        """Tell whether the measure meets the limit and the end of its interval does not; NaN decides against it."""
        return self.is_met_by(self.value) and not self.is_met_by(self.end) and not math.isnan(self.end)

    def further_texts(self, texts: int) -> int:
        """Give about how many more texts would narrow the interval enough: its width goes with 1 / sqrt(texts)."""
        room = abs(self.value - self.limit)
        needed = texts * (abs(self.value - self.end) / room) ** 2 if room > 0.0 else math.inf
        return math.ceil(min(needed - texts, _MOST_FURTHER_TEXTS))


def judge(
    measures: Measures, placement: Placement, gate: Gate, ran_on: RunKind, fewest: int = FEWEST_TEXTS
) -> tuple[str, ...]:
    """Give one sentence for each limit of the gate that is missed, with the measured value and the limit.

    Args:
        measures: of the artifact, or of the QDQ model in its place, against FP32.
        placement: of the artifact; float fallbacks and host operators have limits, too.
        gate: of the target.
        ran_on: the kind of run that gave the measures; the gate lists the kinds that suffice for export.
        fewest: how many texts or images a judgement takes.
    """
    failures = [_missed(each, measures.texts) for each in _limits(measures, gate) if not each.is_met_by(each.end)]
    if measures.texts < fewest:
        failures.append(
            f"measured on {measures.texts}; at least {fewest} are needed: undecided: about "
            f"{fewest - measures.texts} more."
        )
    failures += [*judge_constants(measures, gate), *judge_placement(placement, gate)]
    if ran_on not in gate.export_run_kinds:
        failures.append(f"it ran on {ran_on}; for export {' or '.join(gate.export_run_kinds)} is needed.")
    return tuple(failures)


def judge_constants(measures: Measures, gate: Gate) -> tuple[str, ...]:
    """Judge what a few texts show as well as many: invariance and the error of the norm."""
    failures = []
    # `not >=` rather than `<`: a NaN that got this far must not pass.
    if not measures.invariance_min >= gate.invariance_min:
        failures.append(f"invariance is {measures.invariance_min:.6f}; at least {gate.invariance_min:g} is needed.")
    limit = norm_limit(measures, gate)
    if not measures.norm_error_max <= limit:
        failures.append(f"norm error is {measures.norm_error_max:.2e} of FP32's norm; at most {limit:g} is allowed.")
    return tuple(failures)


def judge_exactness(exactness: Exactness | None, gate: Gate, other: str) -> tuple[str, ...]:
    """Judge how near vectors are to those of another run of the same codes; `other` names that run."""
    if exactness is None:
        return (f"the vectors were not compared with those of {other}.",)
    if exactness.centred_cosine_min >= gate.exactness_min:
        return ()
    return (
        f"exactness: centred cosine with {other} is {exactness.centred_cosine_min:.6f} at worst; at least "
        f"{gate.exactness_min:g} is needed.",
    )


def judge_there(measures: Measures, host: Exactness | None, gate: Gate) -> tuple[str, ...]:
    """Judge the golden inputs on another machine: too few for the limits on many texts, so by exactness.

    Args:
        measures: of the golden inputs there, against FP32.
        host: how near the vectors are to those of the machine that exported the bundle; None where it ran nothing.
            Then mean and smallest centred cosine with FP32 are judged as they are, without an interval.
        gate: of the target.
    """
    if host is not None:
        return judge_constants(measures, gate) + judge_exactness(host, gate, EXPORTING_MACHINE)
    floors = (
        ("centred cosine mean", measures.centred_cosine_mean, gate.centred_cosine_mean_min),
        ("centred cosine min", measures.centred_cosine_min, gate.centred_cosine_min_min),
    )
    missed = tuple(
        f"{name} is {value:.6f}; at least {limit:g} is needed." for name, value, limit in floors if not value >= limit
    )
    return missed + judge_constants(measures, gate)


def further_texts(measures: Measures, gate: Gate) -> int | None:
    """Give about how many more texts would decide, where means miss their limits by nothing but their intervals.

    None where every limit of `measures` is met, or one is missed whatever further texts say.
    """
    limits = [each for each in _limits(measures, gate) if not each.is_met_by(each.end)]
    if not limits or not all(each.is_undecided for each in limits) or judge_constants(measures, gate):
        return None
    return max(each.further_texts(measures.texts) for each in limits)


def share_allowed(report: ParityReport) -> float | None:
    """Give the share of the quantisation loss that may stay for all that a report missed to be met.

    1 - cosine, 1 - Spearman and regret@10 go with the square of the vectors' error, so all shrink alike. None where
    nothing is missed, or anything that does not follow from the loss: invariance, norms, placement, exactness.
    """
    missed = _missed_limits(report)
    if not missed or len(missed) != len(report.failures):
        return None
    return min((1.0 - each.limit) / (1.0 - each.end) if each.is_floor else each.limit / each.end for each in missed)


def is_undecided(report: ParityReport) -> bool:
    """Tell whether a report failed by nothing but the width of its intervals, so that more texts may let it pass."""
    missed = _missed_limits(report)
    return bool(missed) and len(missed) == len(report.failures) and all(limit.is_undecided for limit in missed)


def _missed_limits(report: ParityReport) -> list[_Limit]:
    """List the limits on many texts that the measures miss, those with other runtime settings, too."""
    all_measures = (report.measures, *(setting.measures for setting in report.other_settings))
    return [
        limit
        for measures in all_measures if measures is not None
        for limit in _limits(measures, report.gate) if not limit.is_met_by(limit.end)
    ]  # fmt: skip


def fewest_samples(samples: TextSet | ImageSet) -> int:
    """Give how many texts or images a judgement takes."""
    return FEWEST_TEXTS if isinstance(samples, TextSet) else FEWEST_IMAGES


def judge_report(report: ParityReport, placement: Placement) -> tuple[str, ...]:
    """Judge all that a report with measures holds, as `edgeq.evaluation.parity.report` did when it was made."""
    if report.measures is None:
        return report.failures
    failures = judge(report.measures, placement, report.gate, report.ran_on, fewest_samples(report.texts))
    if report.measured == "qdq-model" or report.exactness is not None:
        failures += judge_exactness(report.exactness, report.gate, QDQ_MODEL)
    settings = judge_settings(report.other_settings, report.gate, fewest_samples(report.texts))
    return failures + settings + judge_end_to_end(report.end_to_end)


def shown(measures: Measures, gate: Gate) -> tuple[tuple[str, str, str], ...]:
    """Give name, value (with its interval) and limit of each measure; what judges nothing has the limit "-"."""
    found = measures
    mean, low, high = (
        f"{value:.5f}"
        for value in (found.centred_cosine_mean, found.centred_cosine_mean_low, found.centred_cosine_mean_high)
    )
    lost, least, most = (f"{value:.5f}" for value in (found.regret_mean, found.regret_mean_low, found.regret_mean_high))
    return (
        ("centred cosine, mean", f"{mean} [{low}, {high}]", f">= {gate.centred_cosine_mean_min:g}"),
        ("centred cosine, lowest hundredth", f"{found.centred_cosine_p01:.5f}", f">= {gate.centred_cosine_p01_min:g}"),
        ("centred cosine, worst text", f"{found.centred_cosine_min:.5f}", f">= {gate.centred_cosine_min_min:g}"),
        ("regret@10, mean", f"{lost} [{least}, {most}]", f"<= {gate.regret_mean_max:g}"),
        ("regret@10, highest hundredth", f"{found.regret_p99:.5f}", f"<= {gate.regret_p99_max:g}"),
        ("Spearman of pairwise similarities", f"{found.spearman:.5f}", f">= {gate.spearman_min:g}"),
        ("same text, other padding or batch: cosine", f"{found.invariance_min:.7f}", f">= {gate.invariance_min:g}"),
        ("error of the norm", f"{found.norm_error_max:.1e}", f"<= {norm_limit(found, gate):g}"),
        ("largest absolute error", f"{found.max_abs_error:.4f}", "-"),
        ("plain cosine, mean", f"{found.cosine_mean:.5f}", "-"),
        ("plain cosine, worst text", f"{found.cosine_min:.5f}", "-"),
        ("top-10 overlap", f"{found.top10_overlap:.4f}", "-"),
    )


def _limits(measures: Measures, gate: Gate) -> tuple[_Limit, ...]:
    """List the measures of many texts with their limits."""
    found = measures
    return (
        _Limit(
            "centred cosine mean", found.centred_cosine_mean, found.centred_cosine_mean_low,
            gate.centred_cosine_mean_min, True,
        ),
        *(
            _Limit(name, value, value, limit, True)
            for name, value, limit in (
                ("centred cosine of the lowest hundredth", found.centred_cosine_p01, gate.centred_cosine_p01_min),
                ("centred cosine min", found.centred_cosine_min, gate.centred_cosine_min_min),
                ("Spearman of pairwise similarities", found.spearman, gate.spearman_min),
            )
        ),
        _Limit("regret@10 mean", found.regret_mean, found.regret_mean_high, gate.regret_mean_max, False),
        _Limit(
            "regret@10 of the highest hundredth", found.regret_p99, found.regret_p99, gate.regret_p99_max, False
        ),
    )  # fmt: skip


def _missed(found: _Limit, texts: int) -> str:
    """Spell a missed limit; a mean that meets it is undecided, and the end of its interval is named."""
    bound = f"at least {found.limit:g} is needed" if found.is_floor else f"at most {found.limit:g} is allowed"
    if not found.is_undecided:
        return f"{found.name} is {found.value:.6f}; {bound}."
    return (
        f"{found.name} is {found.value:.6f}, and {found.end:.6f} at the worse end of its interval; {bound}: undecided: "
        f"about {found.further_texts(texts)} more texts."
    )


def judge_placement(placement: Placement, gate: Gate) -> tuple[str, ...]:
    """Give one sentence for each limit that the placement misses: float fallbacks, and host operators of one file."""
    failures = []
    fallbacks = placement.float_fallbacks
    if len(fallbacks) > gate.float_fallbacks_max:
        failures.append(
            f"{len(fallbacks)} weight products run in float that the scheme makes integer ({', '.join(fallbacks)}); "
            f"at most {gate.float_fallbacks_max} are allowed."
        )
    for file in sorted({item.file for item in placement.host_operators}):
        on_host = [f"{item.operator} ({item.output})" for item in placement.host_operators if item.file == file]
        if len(on_host) > gate.host_operators_max:
            failures.append(
                f"{file}: {len(on_host)} operators run on the host ({', '.join(on_host)}); "
                f"at most {gate.host_operators_max} may."
            )
    return tuple(failures)


def judge_settings(settings: Sequence[SettingReport], gate: Gate, fewest: int = FEWEST_TEXTS) -> tuple[str, ...]:
    """Judge the measures of other runtime settings by the gate, without invariance, placement and the kind of run."""
    unplaced = Placement(integer_matmuls=0, float_by_scheme=(), float_fallbacks=(), operators={})
    failures: list[str] = []
    for setting in settings:
        if setting.measures is not None:
            asked = gate.model_copy(update={"invariance_min": -1.0, "export_run_kinds": (setting.ran_on,)})
            found = judge(setting.measures, unplaced, asked, setting.ran_on, fewest)
            failures += [f"{setting.name}: {failure}" for failure in found]
    return tuple(failures)


def judge_end_to_end(found: EndToEnd) -> tuple[str, ...]:
    """Give one sentence for each text whose tokens or vectors differ from those of the source's own path."""
    return found.failures or (("the texts differ from the source's own path.",) if found.status == "failed" else ())


def norm_limit(measures: Measures, gate: Gate) -> float:
    """Give the gate's limit on the norm error: a tighter one for models that normalise their vectors."""
    return gate.norm_error_max if measures.is_normalized else gate.norm_error_unnormalized_max
