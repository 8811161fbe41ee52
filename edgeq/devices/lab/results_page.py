"""Write a lab's results as one self-contained HTML page: no scripts, no requests, for light and dark screens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeq.devices.lab.validate import LabResult
from edgeq.system import html_page
from edgeq.system.files import write_bytes

_TEMPLATE = "lab.html.j2"
_NONE = "–"


def require(path: Path) -> None:
    """Check the page's path before devices are used.

    Raises:
        ConfigError: the page cannot be written there.
    """
    html_page.require_path(path, "lab.html")


def write(results: Sequence[LabResult], path: Path) -> None:
    """Write the page atomically.

    Raises:
        StorageFailed: the disk refuses.
    """
    write_bytes(path, render(results).encode("utf-8"))


def render(results: Sequence[LabResult]) -> str:
    """Render the page as HTML; all text is escaped, and its content security policy forbids every request."""
    passed = sum(not item.exit_code for item in results)
    return (
        html_page.environment("edgeq.devices.lab")
        .get_template(_TEMPLATE)
        .render(results=results, passed=passed, cells=cells)
    )


def cells(result: LabResult) -> list[str]:
    """Give the cells of a row: device, result, kind of run, mean and smallest centred cosine, times, memory, CPU."""
    report = result.report
    if report is None:
        return [result.device, f"no report (exit code {result.exit_code})", *[_NONE] * 6]
    measures = report.measures
    cosines = (
        [_NONE] * 2
        if measures is None
        else [f"{measures.centred_cosine_mean:.6f}", f"{measures.centred_cosine_min:.6f}"]
    )
    times = ", ".join(f"{cell.latency.p50_ms:.2f} ms at {cell.sequence}" for cell in report.cells)
    memory = _NONE if report.peak_memory_bytes is None else f"{report.peak_memory_bytes / 1e6:.0f} MB"
    return [result.device, report.status, report.ran_on, *cosines, times or _NONE, memory, report.machine.cpu]
