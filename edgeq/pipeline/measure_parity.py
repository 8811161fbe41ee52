"""Measure an artifact's parity with FP32 on the validation samples, with the target's settings and all others here."""

from __future__ import annotations

import logging
from pathlib import Path

from edgeq.backends.contract import Backend, HasOtherSettings, obstacle
from edgeq.data.sessions import Embeddings, Session, embed_batches
from edgeq.data.tokens import batches, token_limit
from edgeq.errors import DeviceUnavailable
from edgeq.evaluation import parity
from edgeq.pipeline.stage_results import Validation
from edgeq.records import Artifact, EndToEnd, ParityReport, SettingReport, Target
from edgeq.system import host
from edgeq.system.progress import StageProgress

_log = logging.getLogger(__name__)


def require_device(backend: Backend, target: Target) -> None:
    """Refuse a target whose device this machine lacks, unless its gate allows exports that were not run.

    Raises:
        DeviceUnavailable: the device is missing.
    """
    missing = obstacle(backend, target)
    if missing is not None and "not-run" not in target.gate.export_run_kinds:
        raise DeviceUnavailable(
            f"{target.name}: {missing}; its gate asks for a run on {' or '.join(target.gate.export_run_kinds)}. "
            "Export on such a machine."
        )


def measure_parity(
    backend: Backend,
    artifact: Artifact,
    folder: Path,
    target: Target,
    validation: Validation,
    max_sequence: int,
    progress: StageProgress,
    end_to_end: EndToEnd,
) -> tuple[ParityReport, Embeddings | None]:
    """Run an artifact, measure its vectors against FP32's, and judge them by the gate; report `not-run` without device.

    Args:
        backend: of the artifact.
        artifact: the result of `lower`.
        folder: the artifact's paths are relative to it.
        target: of the artifact, with the gate.
        validation: texts or images, and FP32's vectors of them.
        max_sequence: the longest sequence the model takes.
        progress: called as `progress(done, total)`.
        end_to_end: how the bundle's tokens compare with the source's own.

    Returns:
        The report, and the artifact's vectors, float32[texts, dim]; None when it was not run.
    """
    limit = token_limit(target.buckets_tokens, max_sequence)
    missing = obstacle(backend, target)
    progress(0, 2)
    settings = _other_settings(backend, artifact, folder, target, validation, limit)
    if missing is not None:
        progress(2, 2)
        _log.warning(
            "%s: was not run: %s. The bundle says so, and a release needs a report from a device.", target.name, missing
        )
        found = parity.not_run(target, artifact.placement, validation.record, missing, settings, end_to_end)
        return found, None
    embeddings, invariance = _measured(backend.load(artifact, folder, target), validation, target, limit)
    progress(2, 2)
    found = parity.report(
        target, host.run_kind(target.runs_on), artifact.placement, validation.reference, embeddings,
        validation.texts, validation.record, invariance, settings, end_to_end,
    )  # fmt: skip
    return found, embeddings


def _measured(session: Session, validation: Validation, target: Target, limit: int) -> tuple[Embeddings, float]:
    """Run the validation samples; give their vectors, float32[samples, dim], and the invariance."""
    embeddings = embed_batches(session, batches(validation.samples), len(validation.texts))
    few = target.gate.parity_texts
    return embeddings, parity.invariance(session, validation.samples, limit, target.buckets_tokens, few)


def _other_settings(
    backend: Backend, artifact: Artifact, folder: Path, target: Target, validation: Validation, limit: int
) -> tuple[SettingReport, ...]:
    """Measure the artifact with each other runtime setting of its backend."""
    if not isinstance(backend, HasOtherSettings):
        return ()
    reports: list[SettingReport] = []
    for setting in backend.other_settings(artifact, folder, target):
        measures = None
        if setting.session is not None:
            embeddings, invariance = _measured(setting.session, validation, target, limit)
            measures = parity.measure(validation.reference, embeddings, validation.texts, invariance)
        reports.append(
            SettingReport(name=setting.name, ran_on=setting.ran_on, measures=measures, reason=setting.reason)
        )
    return tuple(reports)
