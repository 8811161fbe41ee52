"""Render release notes from the records of a release's bundles and of the previous release's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgeq.records import FileRef, Manifest, ParityReport

if TYPE_CHECKING:
    from edgeq.release.eligibility import Candidate

NOTES = "RELEASE_NOTES.md"
_TEMPLATE = "release_notes.md.j2"
_NONE = "-"


@dataclass(frozen=True)
class Packed:
    """Hold a bundle and its archive, of this release or of the previous one."""

    candidate: Candidate
    archive: FileRef

    @property
    def name(self) -> tuple[str, str]:
        """Give the names of model and target, which identify a bundle across releases."""
        return self.candidate.manifest.source.name, self.candidate.manifest.target.name


def release_notes(
    version: str, packed: Sequence[Packed], previous: Sequence[Packed] | None, public_key: str | None
) -> str:
    """Give the notes as Markdown.

    Args:
        version: of the release.
        packed: the bundles of the release.
        previous: the bundles of the previous release; None without one.
        public_key: in minisign's format; None when nothing is signed.
    """
    before = {each.name: each for each in previous or ()}
    environment = Environment(
        loader=PackageLoader("edgeq.release"), undefined=StrictUndefined, autoescape=False,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_plain,
    )  # fmt: skip
    return environment.get_template(_TEMPLATE).render(
        version=version,
        sections=[_section(each, before.get(each.name), previous is not None) for each in packed],
        gone=[f"{model} for {target}" for model, target in before if (model, target) not in {p.name for p in packed}],
        public_key=public_key,
    )


def _plain(value: object) -> object:
    """Replace Markdown's special characters in strings of records, which may come from strangers."""
    return re.sub(r"[|`<>\[\]\x00-\x1f\x7f-\x9f\ud800-\udfff]+", " ", value) if isinstance(value, str) else value


def _section(now: Packed, then: Packed | None, has_previous: bool) -> dict[str, object]:
    """Give the template's variables for one bundle."""
    manifest, report = now.candidate.manifest, now.candidate.report
    return {
        "title": f"{manifest.source.name} for {manifest.target.name}",
        "summary": manifest.target.summary,
        "archive": now.archive,
        "report": report,
        "proofs": _proofs(now.candidate),
        "rows": list(_rows(now, then)),
        "is_new": has_previous and then is None,
        "caveat": None if then is None else _caveat(report, then.candidate.report),
        "changes": [] if then is None else list(_changes(manifest, then.candidate.manifest)),
        "is_compared": then is not None,
    }


def _proofs(candidate: Candidate) -> list[str]:
    """Describe each run that passed: kind of run, machine, samples."""
    report, found = candidate.report, []
    if report.status == "passed":
        found.append(f"{report.ran_on} ({report.machine}), on {report.texts.count} samples of {report.texts.origin}")
    for device in candidate.devices.values():
        if device.status == "passed" and device.measures is not None:
            found.append(f"{device.ran_on} ({device.machine.cpu}), on its {device.measures.texts} golden samples")
    return found


def _rows(now: Packed, then: Packed | None) -> Iterator[tuple[str, str, str, str]]:
    """Give name, previous value, present value and difference of each figure.

    Latencies have no difference: those of two moments, under another load each, say nothing of it.
    """
    timed = _latencies(now)
    figures, before = _figures(now), {} if then is None else _figures(then)
    for name in dict.fromkeys((*figures, *before)):  # also figures that only the previous release has
        new, old = figures.get(name), before.get(name)
        change = _NONE if new is None or old is None or name in timed else format(new[0] - old[0], f"+{new[1]}")
        yield name, _spelled(old), _spelled(new), change


def _spelled(figure: tuple[float, str] | None) -> str:
    return _NONE if figure is None else format(*figure)


def _figures(packed: Packed) -> dict[str, tuple[float, str]]:
    """Give the figures of a bundle, each with its number format."""
    manifest, measures = packed.candidate.manifest, packed.candidate.report.measures
    figures: dict[str, tuple[float, str]] = {}
    if measures is not None:
        figures = {
            "centred cosine with FP32, mean": (measures.centred_cosine_mean, ".5f"),
            "centred cosine with FP32, worst sample": (measures.centred_cosine_min, ".5f"),
            "regret@10, mean": (measures.regret_mean, ".5f"),
            "Spearman of pairwise similarities": (measures.spearman, ".5f"),
            "largest absolute error": (measures.max_abs_error, ".4f"),
        }
    figures |= _latencies(packed)
    figures["size of the artifact, MB"] = sum(file.size_bytes for file in manifest.artifact.files) / 1e6, ".2f"
    figures["size of the archive, MB"] = packed.archive.size_bytes / 1e6, ".2f"
    return figures


def _latencies(packed: Packed) -> dict[str, tuple[float, str]]:
    """Give the median latencies on devices, named by machine: only equal machines can be compared."""
    return {
        f"{device.machine.cpu}, batch {cell.batch}, {cell.sequence} tokens: median, ms": (cell.latency.p50_ms, ".2f")
        for device in packed.candidate.devices.values() if device.ran_on == "device" for cell in device.cells
    }  # fmt: skip


def _caveat(now: ParityReport, then: ParityReport) -> str | None:
    """Give the reasons why figures of two reports may differ without a change of the artifact, or None."""
    reasons = []
    if now.texts.sha256 != then.texts.sha256:
        reasons.append(f"on other samples ({then.texts.count} before, {now.texts.count} now)")
    if now.ran_on != then.ran_on:
        reasons.append(f"in another kind of run ({then.ran_on} before, {now.ran_on} now)")
    if now.machine != then.machine:
        reasons.append(f"on another machine ({then.machine} before)")
    return f"Measured {', and '.join(reasons)}: a difference may come from that." if reasons else None


def _changes(now: Manifest, then: Manifest) -> Iterator[str]:
    """Give one phrase for each input that changed since the previous release."""
    if now.source.sha256 != then.source.sha256:
        yield f"the model itself: {_short(then.source.sha256)} became {_short(now.source.sha256)}"
    elif now.float_model.file.sha256 != then.float_model.file.sha256:
        yield "the float model: the same model is exported or rewritten in another way"
    if now.calibration.texts.sha256 != then.calibration.texts.sha256:
        texts, old = now.calibration.texts, then.calibration.texts
        yield f"the calibration data: {old.count} of {old.origin} became {texts.count} of {texts.origin}"
    elif now.calibration.file.sha256 != then.calibration.file.sha256:
        yield "the calibration, on the same data"
    if now.qdq_model.scheme != then.qdq_model.scheme:
        yield f"the scheme: {then.qdq_model.scheme.name} became {now.qdq_model.scheme.name}, or its details changed"
    for name in ("runtime", "gate", "buckets_tokens", "runs_on"):
        if getattr(now.target, name) != getattr(then.target, name):
            yield f"the target's {name}"
    yield from _tools({"edgeq": then.edgeq, **_versions(then)}, {"edgeq": now.edgeq, **_versions(now)})
    same = [file.sha256 for file in now.artifact.files] == [file.sha256 for file in then.artifact.files]
    yield "not the artifact: it is the same, byte for byte" if same else "the artifact's bytes"


def _versions(manifest: Manifest) -> dict[str, str]:
    return {**manifest.tools, **manifest.artifact.tools}


def _tools(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Give one phrase for each tool whose version changed."""
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name} {then.get(name, 'not used')} became {now.get(name, 'not used')}"


def _short(sha256: str) -> str:
    return sha256[:12]
