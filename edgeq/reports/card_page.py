"""Write a parity card as one self-contained HTML page: no scripts, no requests, for light and dark, wide and narrow."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from edgeq.reports import plots
from edgeq.reports.contents import Card, Pair
from edgeq.system import html_page
from edgeq.system.files import write_bytes

_TEMPLATE = "parity_card.html.j2"


def require(path: Path) -> None:
    """Check that matplotlib is installed, and the page's path, before anything is measured.

    Raises:
        ToolMissing: matplotlib is not installed.
        ConfigError: the page cannot be written there.
    """
    plots.require()
    html_page.require_path(path, "card.html")


def write(card: Card, path: Path) -> None:
    """Write the page atomically.

    Raises:
        ToolMissing: matplotlib is not installed.
        StorageFailed: the disk refuses.
    """
    write_bytes(path, render(card).encode("utf-8"))


def render(card: Card) -> str:
    """Render the page as HTML; all text is escaped, and its content security policy forbids every request.

    Raises:
        ToolMissing: matplotlib is not installed.
    """
    plots.require()
    environment = html_page.environment("edgeq.reports")
    environment.filters["fixed"] = _fixed
    drawings = {
        "distribution": plots.distribution(card),
        "layers": plots.layers(card),
        "latency": plots.latency(card),
        "worst": plots.worst(card),
        "operators": plots.operators(card),
    }
    return environment.get_template(_TEMPLATE).render(
        card=card,
        drawings={name: None if drawing is None else Markup(drawing) for name, drawing in drawings.items()},
        names=list(dict.fromkeys(name for pair in card.pairs for name in (pair.first, pair.second))),
        pairs=_by_names(card.pairs),
        lengths=sorted({time.tokens for row in card.rows for time in row.latency}),
        dtypes={row.name: plots.dtype_counts(row) for row in card.rows},
    )


def _by_names(pairs: tuple[Pair, ...]) -> dict[tuple[str, str], Pair]:
    """Give each pair of runtimes by its two names in both orders."""
    return {names: pair for pair in pairs for names in ((pair.first, pair.second), (pair.second, pair.first))}


def _fixed(value: float | None, digits: int) -> str:
    """Format a number with so many decimals, and None as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"
