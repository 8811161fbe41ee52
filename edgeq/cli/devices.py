"""Show and keep the reports of the device script, for the verb `validate` with --on and --lab."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli import console
from edgeq.errors import EdgeqError, ParityFailed, error_of

if TYPE_CHECKING:
    from edgeq.devices.contract import Transport
    from edgeq.devices.lab.validate import LabResult
    from edgeq.devices.report import DeviceReport
    from edgeq.records import Gate


def conclude(found: DeviceReport, transport: Transport, bundle: Path, as_json: bool) -> None:
    """Keep a device report beside its bundle, and print it.

    Raises:
        ParityFailed: the vectors miss the gate.
        StorageFailed: the report cannot be written.
    """
    from edgeq.bundle.manifest import load_manifest
    from edgeq.devices.report import keep_report

    manifest = load_manifest(bundle)
    path = keep_report(bundle, transport.name, found)
    if as_json:
        console.put_json({"report": str(path), **found.model_dump(mode="json")})
    else:
        _put_report(found, manifest.target.gate, path)
    if found.status == "failed":
        raise ParityFailed(f"{bundle}: misses the gate of {found.target} there: {' '.join(found.failures)}")


def _put_report(report: DeviceReport, gate: Gate, path: Path) -> None:
    """Print a device report as one table; it has times only where it ran on the device."""
    from edgeq.evaluation.gate import shown

    rows: list[list[str]] = []
    if report.measures is not None:
        is_judged = report.host is None
        for name, value, limit in shown(report.measures, gate):
            rows.append([name, value, limit if is_judged or name.startswith(("same text", "error of")) else "-"])
    if report.host is not None:
        near = report.host
        rows.append(["centred cosine with the exporting machine, mean", f"{near.centred_cosine_mean:.6f}", "-"])
        limit = f">= {gate.exactness_min:g}"
        rows.append(["centred cosine with the exporting machine, worst", f"{near.centred_cosine_min:.6f}", limit])
    for cell in report.cells:
        told = cell.latency
        name = (
            f"latency of {cell.sequence} tokens, p50 / p90 / p99" if cell.sequence > 1 else "latency, p50 / p90 / p99"
        )
        rows.append([name, f"{told.p50_ms:.2f} / {told.p90_ms:.2f} / {told.p99_ms:.2f} ms", ""])
    if report.load_ms is not None:
        rows.append(["loading", f"{report.load_ms:.0f} ms", ""])
    if report.peak_memory_bytes is not None:
        rows.append(["peak memory", console.megabytes(report.peak_memory_bytes), ""])
    title = f"{report.target}: {report.status}, ran on {report.ran_on} ({report.transport}: {report.machine.cpu})"
    console.put_table(("measure", "value", "gate"), rows, title)
    console.put(f"report: {path}")


def validate_lab(
    bundles: list[Path], devices: Path, runs: int, ray: str | None, html: Path | None, as_json: bool
) -> None:
    """Validate every bundle on every device of its target, and print one table.

    Raises:
        EdgeqError: a bundle did not pass on a device; the class is that of the first failure.
    """
    from edgeq.devices.lab import results_page
    from edgeq.devices.lab.devices import read_devices
    from edgeq.devices.lab.validate import Plan, validate_all

    if html is not None:
        results_page.require(html)
    known = read_devices(devices)
    with console.stages() as progress:
        results = validate_all(bundles, known, Plan(runs=runs, ray=ray), progress)
    if html is not None:
        results_page.write(results, html)
    if as_json:
        console.put_json({"results": [item.model_dump(mode="json") for item in results]})
    else:
        _put_lab(results)
    wrong = [item for item in results if item.exit_code]
    if wrong:
        listed = "\n".join(f"  - {item.bundle} on {item.device}: {item.message}" for item in wrong)
        kind = error_of(wrong[0].exit_code) or EdgeqError
        raise kind(f"{len(wrong)} of {len(results)} did not pass:\n{listed}")


def _put_lab(results: tuple[LabResult, ...]) -> None:
    from edgeq.devices.lab.results_page import cells

    columns = "bundle,device,result,ran on,centred cosine mean,min,p50 at tokens,peak memory,CPU".split(",")
    console.put_table(columns, [[item.bundle, *cells(item)] for item in results])
