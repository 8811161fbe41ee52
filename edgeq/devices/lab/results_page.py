"""Write the results of a lab as one HTML page: no script, nothing fetched, readable in light and dark, on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgeq.devices.lab.validate import LabResult
from edgeq.errors import ConfigError
from edgeq.system.files import write_bytes

TEMPLATE = "lab.html.j2"
_NONE = "–"


def require(path: Path) -> None:
    """Say what keeps a page from being written before minutes are spent on it.

    Raises:
        ConfigError: the page's folder is not there, or a folder stands in its place.
    """
    if path.is_dir():
        raise ConfigError(f"--html: {path} is a folder; a file is needed. Give {path / 'lab.html'}, for one.")
    if not path.parent.is_dir():
        raise ConfigError(f"--html: the folder {path.parent} is not there. Make it, or choose another.")


def write(results: Sequence[LabResult], path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageFailed: the disk refuses.
    """
    write_bytes(path, render(results).encode("utf-8"))


def render(results: Sequence[LabResult]) -> str:
    """Give the page. All text is escaped, and what a browser may load is forbidden in the page itself."""
    environment = Environment(
        loader=PackageLoader("edgeq.devices.lab"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    passed = sum(not item.exit_code for item in results)
    return environment.get_template(TEMPLATE).render(results=results, passed=passed, cells=cells)


def cells(result: LabResult) -> list[str]:
    """Give what a row shows: device, result, where it ran, two cosines, times (a device's only), memory, CPU."""
    report = result.report
    if report is None:
        return [result.device, f"no report (exit code {result.exit_code})", *[_NONE] * 6]
    measures = report.measures
    cosines = [_NONE] * 2 if measures is None else [f"{measures.cosine_mean:.6f}", f"{measures.cosine_min:.6f}"]
    times = ", ".join(f"{cell.latency.p50_ms:.2f} ms at {cell.sequence}" for cell in report.cells)
    memory = _NONE if report.peak_memory_bytes is None else f"{report.peak_memory_bytes / 1e6:.0f} MB"
    return [result.device, report.status, report.ran_on, *cosines, times or _NONE, memory, report.machine.cpu]
