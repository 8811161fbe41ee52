"""Read what the device script found: `device-report.json`, the evidence that a bundle works where it will run.

The script is one file, `tools/device/validate.py`, that imports nothing of edgeq; each bundle carries the same bytes as
`validate.py`. A report is kept beside its bundle, because a bundle never changes: `OUT/TARGET.NAME.device-report.json`.
It comes from another machine, so it is read strictly, and its verdict is reached again from its measures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from edgeq.bundle.benchmark import Latency
from edgeq.bundle.checksums import SUMS
from edgeq.bundle.manifest import MANIFEST, load_manifest
from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.evaluation.gate import judge
from edgeq.records import Manifest, Measures, Placement, Record, RunKind, Sha256
from edgeq.system.files import sha256_file, storage_errors, write_bytes

REPORT = "device-report.json"
LARGEST_BYTES = 1_000_000

TransportKind = Literal["by-hand", "local", "ssh", "adb", "adb-native", "arm64"]


class DeviceCell(Record):
    """Hold the latency of one text, or image, at one length."""

    batch: int
    sequence: int  # tokens; 1 for an image
    runs: int
    warmup_runs: int
    latency: Latency


class Agreement(Record):
    """Hold how near the vectors are to those of the machine that exported the bundle."""

    cosine_mean: float
    cosine_min: float
    max_abs_error: float


class DeviceMachine(Record):
    """Describe the machine; `lacks` lists what the target asks for and it has not."""

    machine: str
    accelerator: str | None  # the NPU that the artifact ran on, spelt as in a target's runs_on
    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    system: str
    memory_bytes: int | None
    lacks: tuple[str, ...]


class Conditions(Record):
    """Hold temperatures and clocks, as far as the system tells them."""

    temperatures_c: dict[str, float]
    frequencies_mhz: dict[str, float]


class DeviceReport(Record):
    """Say how the golden inputs of one bundle did in one place. Times are there only when it ran on the device."""

    format: Literal[1]
    target: str
    manifest_sha256: Sha256  # which bundle
    transport: TransportKind  # how the machine was reached
    ran_on: RunKind
    status: Literal["passed", "failed"]
    failures: tuple[str, ...]  # a sentence for each limit that is missed
    measures: Measures | None  # against FP32; None when the vectors could not be compared
    host: Agreement | None  # with the machine that exported the bundle; None when that one ran nothing
    machine: DeviceMachine
    tools: dict[str, str]
    threads: int  # 0: the runtime's own choice
    load_ms: float | None
    peak_memory_bytes: int | None
    cells: tuple[DeviceCell, ...]
    before: Conditions
    after: Conditions


def read_report(path: Path, bundle: Path) -> DeviceReport:
    """Read a device report and hold it against its bundle.

    Args:
        path: the report.
        bundle: that it is said to be about.

    Raises:
        ConfigError: there is no bundle.
        BundleCorrupt: it is not what the device script writes, is about another bundle, or judges itself wrongly.
    """
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        content = file.read(LARGEST_BYTES + 1)
    return parse_report(content, str(path), bundle)


def parse_report(content: bytes, where: str, bundle: Path) -> DeviceReport:
    """Parse a device report and hold it against its bundle.

    Raises:
        ConfigError: there is no bundle.
        BundleCorrupt: it is not what the device script writes, is about another bundle, or judges itself wrongly.
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
    """Say what keeps a report from being honest evidence for a bundle, or None."""
    if report.manifest_sha256 != sha256 or report.target != manifest.target.name:
        return f"is about another bundle ({report.target}, manifest {report.manifest_sha256[:12]})"
    if report.measures is None and report.status == "passed":
        return "says passed without measures"
    if report.ran_on != "device" and (report.cells or report.load_ms is not None):
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
    """Say whether every string can be shown on a terminal as it is."""
    if isinstance(value, Mapping):
        return all(_is_printable(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(_is_printable(item) for item in value)
    return not isinstance(value, str) or value.isprintable()


def judged(report: DeviceReport, manifest: Manifest) -> tuple[str, ...]:
    """Judge the measures of a report by the gate of its bundle, whatever the report says of itself."""
    if report.measures is None:
        return report.failures or ("nothing was measured.",)
    none = Placement(integer_matmuls=0, float_by_scheme=(), float_fallbacks=(), operators={})
    gate = manifest.target.gate
    anywhere = gate.model_copy(update={"export_run_kinds": (report.ran_on,)})
    failures = judge(report.measures, none, anywhere, report.ran_on)
    if report.host is None:
        return failures
    floors = {
        "cosine mean": (report.host.cosine_mean, gate.cosine_mean_min),
        "cosine min": (report.host.cosine_min, gate.cosine_min_min),
    }
    return failures + tuple(
        f"{name} with the exporting machine is {value:.6f}; at least {limit:g} is needed."
        for name, (value, limit) in floors.items()
        if not value >= limit
    )


def report_path(bundle: Path, name: str) -> Path:
    """Say where the report from a place of this name is kept: beside the bundle.

    Raises:
        ConfigError: the name holds nothing that can stand in a file name.
    """
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:100]
    if not slug:
        raise ConfigError(f"{name!r}: cannot name a report; letters or digits are needed. Give the place another name.")
    resolved = bundle.resolve()
    return resolved.parent / f"{resolved.name}.{slug}.{REPORT}"


def keep_report(bundle: Path, name: str, report: DeviceReport) -> Path:
    """Write a report beside its bundle, over an earlier one from the same place.

    Raises:
        ConfigError: the name cannot name a report.
        StorageFailed: the disk refuses.
    """
    path = report_path(bundle, name)
    write_bytes(path, (report.model_dump_json(indent=2) + "\n").encode())
    return path


def reports_of(bundle: Path) -> Mapping[Path, DeviceReport]:
    """Give every report beside a bundle that is about this bundle, by file, sorted; those of others are left out.

    Reports of this bundle's name that are about an older bundle in its place are left out, too.

    Raises:
        ConfigError: there is no bundle.
        BundleCorrupt: a report about this bundle is not what the device script writes, or judges itself wrongly.
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
