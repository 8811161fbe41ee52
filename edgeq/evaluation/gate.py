"""Judge parity measures against a target's gate: a missing measure or NaN meets no limit."""

from __future__ import annotations

from collections.abc import Sequence

from edgeq.records import EndToEnd, Gate, Measures, Placement, RunKind, SettingReport


def judge(measures: Measures, placement: Placement, gate: Gate, ran_on: RunKind) -> tuple[str, ...]:
    """Give one sentence for each limit of the gate that is missed, with the measured value and the limit.

    Args:
        measures: of the artifact against FP32.
        placement: of the artifact; float fallbacks and host operators have limits, too.
        gate: of the target.
        ran_on: the kind of run that gave the measures; the gate lists the kinds that suffice for export.
    """
    floors = (
        ("cosine mean", measures.cosine_mean, gate.cosine_mean_min),
        ("cosine min", measures.cosine_min, gate.cosine_min_min),
        ("top-10 overlap", measures.top10_overlap, gate.top10_overlap_min),
        ("Spearman of pairwise similarities", measures.spearman, gate.spearman_min),
        ("invariance", measures.invariance_min, gate.invariance_min),
    )
    # `not >=` rather than `<`: a NaN that got this far must not pass.
    failures = [
        f"{name} is {value:.6f}; at least {limit:g} is needed." for name, value, limit in floors if not value >= limit
    ]
    limit = norm_limit(measures, gate)
    if not measures.norm_error_max <= limit:
        failures.append(f"norm error is {measures.norm_error_max:.2e} of FP32's norm; at most {limit:g} is allowed.")
    failures += judge_placement(placement, gate)
    if ran_on not in gate.export_run_kinds:
        failures.append(f"it ran on {ran_on}; for export {' or '.join(gate.export_run_kinds)} is needed.")
    return tuple(failures)


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


def judge_settings(settings: Sequence[SettingReport], gate: Gate) -> tuple[str, ...]:
    """Judge the measures of other runtime settings by the gate, without invariance, placement and the kind of run."""
    unplaced = Placement(integer_matmuls=0, float_by_scheme=(), float_fallbacks=(), operators={})
    failures: list[str] = []
    for setting in settings:
        if setting.measures is not None:
            asked = gate.model_copy(update={"invariance_min": -1.0, "export_run_kinds": (setting.ran_on,)})
            found = judge(setting.measures, unplaced, asked, setting.ran_on)
            failures += [f"{setting.name}: {failure}" for failure in found]
    return tuple(failures)


def judge_end_to_end(found: EndToEnd) -> tuple[str, ...]:
    """Give one sentence for each text whose tokens or vectors differ from those of the source's own path."""
    return found.failures or (("the texts differ from the source's own path.",) if found.status == "failed" else ())


def norm_limit(measures: Measures, gate: Gate) -> float:
    """Give the gate's limit on the norm error: a tighter one for models that normalise their vectors."""
    return gate.norm_error_max if measures.is_normalized else gate.norm_error_unnormalized_max
