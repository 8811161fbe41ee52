"""Measure an artifact's parity with FP32 on the validation samples, with the target's settings and all others here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq.backends.contract import Backend, HasOtherSettings, Setting, obstacle
from edgeq.data.sessions import Embeddings, Session, embed_batches
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import batches, token_limit
from edgeq.errors import DeviceUnavailable
from edgeq.evaluation import parity
from edgeq.evaluation.gate import is_undecided
from edgeq.graph.float_session import FloatSession
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


@dataclass(frozen=True)
class Measured:
    """Hold a parity report, the samples that the artifact itself ran, and its vectors of them; None when not run."""

    report: ParityReport
    validation: Validation
    embeddings: Embeddings | None


def measure_parity(
    backend: Backend,
    artifact: Artifact,
    folder: Path,
    target: Target,
    parts: Iterator[Validation],
    max_sequence: int,
    progress: StageProgress,
    end_to_end: EndToEnd,
    qdq: Path | None = None,
) -> Measured:
    """Run an artifact, measure its vectors against FP32's, and judge them by the gate; report `not-run` without device.

    Further parts of the validation samples run only while a limit is undecided. Where the gate bounds the texts that an
    artifact runs, and its QDQ model is at hand, that is measured against FP32 in ONNX Runtime on all texts, and the
    artifact's vectors of the few are held against the QDQ model's.

    Args:
        backend: of the artifact.
        artifact: the result of `lower`.
        folder: the artifact's paths are relative to it.
        target: of the artifact, with the gate.
        parts: texts or images and FP32's vectors of them, each part with all that were in the one before.
        max_sequence: the longest sequence the model takes.
        progress: called as `progress(done, total)`.
        end_to_end: how the bundle's tokens compare with the source's own.
        qdq: the QDQ model; None where there is none that ONNX Runtime can run.
    """
    limit = token_limit(target.buckets_tokens, max_sequence)
    missing = obstacle(backend, target)
    progress(0, 2)
    validation = next(parts)
    runs = _OtherSettings(backend, artifact, folder, target, limit)
    if missing is not None:
        settings = runs(validation)
        progress(2, 2)
        _log.warning(
            "%s: was not run: %s. The bundle says so, and a release needs a report from a device.", target.name, missing
        )
        found = parity.not_run(target, artifact.placement, validation.record, missing, settings, end_to_end)
        return Measured(found, validation, None)
    session, few = backend.load(artifact, folder, target), target.gate.parity_texts
    ran, own, judged = validation, None, _Growing(session)
    if few is not None and qdq is not None:
        rows = evenly_spaced(len(validation.texts), few)
        ran, judged = validation.chosen(rows), _Growing(FloatSession.of(qdq))
        own = parity.OwnVectors(tuple(rows), _Growing(session)(ran))
    invariance = parity.invariance(session, ran.samples, limit, target.buckets_tokens, few)
    while True:
        embeddings = judged(validation)
        found = parity.report(
            target, host.run_kind(target.runs_on), artifact.placement, validation.reference, embeddings,
            validation.texts, validation.record, invariance, runs(validation), end_to_end, own,
        )  # fmt: skip
        further = next(parts, None) if is_undecided(found) else None
        if further is None:
            break
        _log.info("%s: undecided on %d samples; %d run", target.name, len(validation.texts), len(further.texts))
        validation = further
    progress(2, 2)
    return Measured(found, validation, embeddings) if own is None else Measured(found, ran, own.embeddings)


class _Growing:
    """Embed growing parts of samples with one session: those of the part before are not run again."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._found: list[Embeddings] = []

    def __call__(self, validation: Validation) -> Embeddings:
        """Give the vectors of all samples of a part, float32[samples, dim]."""
        done = sum(map(len, self._found))
        fresh = validation.samples.chosen(range(done, len(validation.texts)))
        if len(fresh):
            self._found.append(embed_batches(self._session, batches(fresh), len(fresh)))
        return np.concatenate(self._found)


class _OtherSettings:
    """Measure an artifact with each other runtime setting of its backend, on growing parts of samples."""

    def __init__(self, backend: Backend, artifact: Artifact, folder: Path, target: Target, limit: int) -> None:
        self._settings: list[Setting] = []
        if isinstance(backend, HasOtherSettings):
            self._settings = list(backend.other_settings(artifact, folder, target))
        self._sessions = [None if each.session is None else _Growing(each.session) for each in self._settings]
        self._invariances: dict[int, float] = {}
        self._target, self._limit = target, limit

    def __call__(self, validation: Validation) -> tuple[SettingReport, ...]:
        """Give a report for each setting."""
        reports = []
        for row, (setting, session) in enumerate(zip(self._settings, self._sessions, strict=True)):
            measures = None
            if session is not None and setting.session is not None:
                if row not in self._invariances:
                    buckets, few = self._target.buckets_tokens, self._target.gate.parity_texts
                    self._invariances[row] = parity.invariance(
                        setting.session, validation.samples, self._limit, buckets, few
                    )
                measures = parity.measure(
                    validation.reference, session(validation), validation.texts, self._invariances[row]
                )
            reports.append(
                SettingReport(name=setting.name, ran_on=setting.ran_on, measures=measures, reason=setting.reason)
            )
        return tuple(reports)
