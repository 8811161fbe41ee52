"""List every reason against releasing a bundle: damage, a missed gate, no accepted kind of run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeq.bundle.manifest import load_manifest, load_report
from edgeq.bundle.verify import read_whole
from edgeq.devices.report import DeviceReport, reports_of
from edgeq.errors import BundleCorrupt, ConfigError, EdgeqError
from edgeq.evaluation.gate import judge_report
from edgeq.records import Manifest, ParityReport, RunKind


@dataclass(frozen=True)
class Candidate:
    """Hold a bundle that may become part of a release.

    Attributes:
        path: OUT/TARGET.
        manifest: of the bundle.
        report: its parity report.
        devices: the device reports beside it, by the part of the file name after the target.
    """

    path: Path
    manifest: Manifest
    report: ParityReport
    devices: Mapping[str, DeviceReport] = field(default_factory=dict)


def find_bundles(given: Sequence[Path]) -> tuple[Path, ...]:
    """Give the bundles at these paths or in these folders, each once.

    Raises:
        ConfigError: a path holds no bundle.
    """
    found: dict[Path, Path] = {}
    for path in given:
        inside = sorted(child.parent for child in path.glob("*/manifest.json")) if path.is_dir() else []
        if (path / "manifest.json").is_file() or not inside:
            inside = [path]
        for bundle in inside:
            if not (bundle / "manifest.json").is_file():
                load_manifest(bundle)  # says what is missing
            found.setdefault(bundle.resolve(), bundle)
    return tuple(found.values())


def examine(path: Path) -> tuple[Candidate | None, tuple[str, ...]]:
    """Read a bundle, and give one sentence for each reason against its release.

    Args:
        path: OUT/TARGET.

    Returns:
        The bundle, or None when its records cannot be read; and the reasons, empty when it may be released.
    """
    reasons: list[str] = []
    try:
        read_whole(path)
    except (BundleCorrupt, ConfigError) as error:
        reasons.append(str(error))
    try:
        candidate = Candidate(path, load_manifest(path), load_report(path), _devices(path))
    except EdgeqError as error:
        return None, tuple(dict.fromkeys((*reasons, str(error))))
    reasons += _against(candidate)
    return candidate, tuple(reasons)


def _devices(path: Path) -> dict[str, DeviceReport]:
    """Give the device reports beside a bundle, by the part of the file name after the target."""
    start = f"{path.resolve().name}."
    return {file.name.removeprefix(start): report for file, report in reports_of(path).items()}


def _against(candidate: Candidate) -> list[str]:
    """Give the reasons in a bundle's records: a missed gate, or no accepted kind of run that passed."""
    manifest, report, name = candidate.manifest, candidate.report, candidate.path
    reasons = []
    if "failed" in (manifest.status, report.status):
        missed = " ".join(report.failures) or "its report does not say where."
        reasons.append(f"{name}: missed the gate of {manifest.target.name}: {missed} Mend the model, and export again.")
    accepted = manifest.target.gate.release_run_kinds
    if not any(kind in accepted for kind in passed_on(candidate)):
        ran_on = dict.fromkeys((report.ran_on, *(device.ran_on for device in candidate.devices.values())))
        where = f"was run on {', '.join(kind for kind in ran_on if kind != 'not-run')} only"
        if set(ran_on) == {"not-run"}:
            where = f"was never run ({report.reason})"
        reasons.append(
            f"{name}: {where}; for a release of {manifest.target.name} a passed validation on "
            f"{' or '.join(accepted)} is needed. Validate it there: edgeq validate --on, or its own validate.py."
        )
    return reasons


def passed_on(candidate: Candidate) -> tuple[RunKind, ...]:
    """Give the kinds of run in which the bundle passed its gate, judged again from the measures."""
    report, placement = candidate.report, candidate.manifest.artifact.placement
    found = [device.ran_on for device in candidate.devices.values() if device.status == "passed"]
    if report.status == "passed" and report.measures is not None:
        found += [] if judge_report(report, placement) else [report.ran_on]
    return tuple(dict.fromkeys(found))
