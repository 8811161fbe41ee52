"""Read and write device reports: the device script's figures and verdict on one bundle on one machine.

The script, `tools/device/validate.py`, is one file that imports nothing of edgeq; each bundle contains a copy. A report
is written beside its bundle, because a bundle never changes: `OUT/TARGET.NAME.device-report.json`. It may come from
another machine, so unknown keys are refused, and its measures are judged again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from edgeq.bundle.checksums import SUMS
from edgeq.bundle.manifest import MANIFEST, load_manifest
from edgeq.bundle.turns import Latency
from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.evaluation.gate import judge_there
from edgeq.records import Exactness, Manifest, Measures, Record, RunKind, Sha256
from edgeq.system.files import sha256_file, storage_errors, write_bytes

REPORT = "device-report.json"
LARGEST_BYTES = 1_000_000

TransportKind = Literal["by-hand", "local", "ssh", "adb", "adb-native", "arm64"]


class DeviceCell(Record):
    """Hold the latency of one text (or image) at one length."""

    batch: int
    sequence: int  # tokens; 1 for an image
    runs: int
    warmup_runs: int
    latency: Latency


class BesideCell(Record):
    """Hold how much faster the bundle is than the other at one length: the median of paired ratios."""

    sequence: int  # tokens; 1 for an image
    pairs: int
    median: float  # the other's time over this one's
    low: float | None  # of the interval; None where the pairs are too few for one
    high: float | None
    level: float
    verdict: str


class Beside(Record):
    """Hold the comparison with another bundle that took turns with this one on the same machine."""

    target: str
    manifest_sha256: Sha256
    cells: tuple[BesideCell, ...]


class DeviceMachine(Record):
    """Describe the machine; `lacks` lists which of the target's demands it does not meet."""

    machine: str
    accelerator: str | None  # the NPU that the artifact ran on, as a target's runs_on names it
    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    system: str
    memory_bytes: int | None
    lacks: tuple[str, ...]


class Conditions(Record):
    """Hold temperatures and clock frequencies, as far as the system lists them."""

    temperatures_c: dict[str, float]
    frequencies_mhz: dict[str, float]


class DeviceReport(Record):
    """Hold the result of one bundle's golden inputs on one machine; times only where that is the target's device."""

    format: Literal[1]
    target: str
    manifest_sha256: Sha256  # identifies the bundle
    transport: TransportKind  # how the machine was reached
    ran_on: RunKind
    status: Literal["passed", "failed"]
    failures: tuple[str, ...]  # a sentence for each limit that is missed
    measures: Measures | None  # against FP32; None when the vectors could not be compared
    host: Exactness | None  # against the exporting machine's vectors; None where it ran nothing
    machine: DeviceMachine
    tools: dict[str, str]
    threads: int  # 0: the runtime's own choice
    load_ms: float | None
    peak_memory_bytes: int | None
    cells: tuple[DeviceCell, ...]
    beside: Beside | None = None  # older device scripts write none
    before: Conditions
    after: Conditions


def read_report(path: Path, bundle: Path) -> DeviceReport:
    """Read a device report, and check it against its bundle.

    Args:
        path: the report.
        bundle: the one that the report should be about.

    Raises:
        ConfigError: there is no bundle.
        BundleCorrupt: the report is malformed, is about another bundle, or its verdict contradicts its measures.
    """
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        content = file.read(LARGEST_BYTES + 1)
    return parse_report(content, str(path), bundle)


def parse_report(content: bytes, where: str, bundle: Path) -> DeviceReport:
    """Parse a device report, and check it against its bundle.

    Args:
        content: the report as JSON.
        where: begins messages.
        bundle: the one that the report should be about.

    Raises:
        ConfigError: there is no bundle.
        BundleCorrupt: the report is malformed, is about another bundle, or its verdict contradicts its measures.
    """
    if len(content) > LARGEST_BYTES:
        raise BundleCorrupt(f"{where}: is larger than {LARGEST_BYTES} bytes; no device report is. Validate again.")
    try:
        report = DeviceReport.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise BundleCorrupt(f"{where}: {key}: {first['msg']}. The device script writes no such report.") from error
    if not _is_printable(report.model_dump()):
        raise BundleCorrupt(f"{where}: holds control characters, which the device script never writes. Validate again.")
    problem = _problem(report, load_manifest(bundle), sha256_file(bundle / MANIFEST))
    if problem is not None:
        raise BundleCorrupt(f"{where}: {problem}. Validate {bundle} again.")
    return report


def _problem(report: DeviceReport, manifest: Manifest, sha256: str) -> str | None:
    """Say how a report contradicts itself or its bundle, or None."""
    if report.manifest_sha256 != sha256 or report.target != manifest.target.name:
        return f"is about another bundle ({report.target}, manifest {report.manifest_sha256[:12]})"
    if report.measures is None and report.status == "passed":
        return "says passed without measures"
    if report.ran_on != "device" and (report.cells or report.beside or report.load_ms is not None):
        return f"holds times, but ran on {report.ran_on}, where they mean nothing"
    if report.ran_on == "device" and report.machine.lacks:
        return f"says it ran on the device, but {report.machine.lacks[0]}"
    if report.measures is not None and report.measures.texts != manifest.golden.count:
        return f"measures {report.measures.texts} inputs; the bundle has {manifest.golden.count}"
    failures = judged(report, manifest)
    if (report.status == "passed") != (not failures):
        return f"says {report.status}, but its measures say: {' '.join(failures) or 'passed'}"
    return None


def _is_printable(value: object) -> bool:
    """Tell whether every string is free of control characters."""
    if isinstance(value, Mapping):
        return all(_is_printable(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(_is_printable(item) for item in value)
    return not isinstance(value, str) or value.isprintable()


def judged(report: DeviceReport, manifest: Manifest) -> tuple[str, ...]:
    """Judge the measures of a report by its bundle's gate; give one sentence for each missed limit."""
    if report.measures is None:
        return report.failures or ("nothing was measured.",)
    return judge_there(report.measures, report.host, manifest.target.gate)


def report_path(bundle: Path, name: str) -> Path:
    """Give the path of the report from a machine of this name: beside the bundle.

    Raises:
        ConfigError: the name holds no letter or digit.
    """
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:100]
    if not slug:
        raise ConfigError(f"{name!r}: cannot name a report; letters or digits are needed. Name the device otherwise.")
    resolved = bundle.resolve()
    return resolved.parent / f"{resolved.name}.{slug}.{REPORT}"


def keep_report(bundle: Path, name: str, report: DeviceReport) -> Path:
    """Write a report beside its bundle; it replaces an earlier one from the same machine.

    Raises:
        ConfigError: the name holds no letter or digit.
        StorageFailed: the disk refuses.
    """
    path = report_path(bundle, name)
    write_bytes(path, (report.model_dump_json(indent=2) + "\n").encode())
    return path


def reports_of(bundle: Path) -> Mapping[Path, DeviceReport]:
    """Give every report beside a bundle that names the sha256 of its manifest, by path, sorted.

    Reports about other bundles, and about an older bundle at the same path, are left out.

    Raises:
        ConfigError: there is no bundle.
        BundleCorrupt: a report about this bundle is malformed, or its verdict contradicts its measures.
    """
    resolved = bundle.resolve()
    if not (resolved / SUMS).is_file():
        load_manifest(bundle)  # says what is missing
    sha256, found = sha256_file(resolved / MANIFEST), {}
    own = {resolved.parent / REPORT, *resolved.parent.glob(f"*.{REPORT}")}
    for path in sorted(own):
        if path.is_file() and path.stat().st_size <= LARGEST_BYTES and sha256.encode() in path.read_bytes():
            found[path] = read_report(path, bundle)
    return found
