"""Write a card as one HTML page: no script, nothing fetched, readable from disk, in light and dark, on a phone."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from edgeq.errors import ConfigError
from edgeq.reports import plots
from edgeq.reports.contents import Card, Pair
from edgeq.system.files import write_bytes

TEMPLATE = "parity_card.html.j2"


def require(path: Path) -> None:
    """Say what keeps a page from being written before minutes are spent on it.

    Raises:
        ToolMissing: matplotlib is not installed.
        ConfigError: the page's folder is not there.
    """
    plots.require()
    if path.is_dir():
        raise ConfigError(f"--html: {path} is a folder; a file is needed. Give {path / 'card.html'}, for one.")
    if not path.parent.is_dir():
        raise ConfigError(f"--html: the folder {path.parent} is not there. Make it, or choose another.")


def write(card: Card, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ToolMissing: matplotlib is not installed.
        StorageFailed: the disk refuses.
    """
    write_bytes(path, render(card).encode("utf-8"))


def render(card: Card) -> str:
    """Give the page. All text is escaped, and what a browser may load is forbidden in the page itself.

    Raises:
        ToolMissing: matplotlib is not installed.
    """
    plots.require()
    environment = Environment(
        loader=PackageLoader("edgeq.reports"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fixed"] = _fixed
    drawings = {
        "distribution": plots.distribution(card),
        "layers": plots.layers(card),
        "latency": plots.latency(card),
        "worst": plots.worst(card),
        "operators": plots.operators(card),
    }
    return environment.get_template(TEMPLATE).render(
        card=card,
        drawings={name: None if drawing is None else Markup(drawing) for name, drawing in drawings.items()},
        names=list(dict.fromkeys(name for pair in card.pairs for name in (pair.first, pair.second))),
        pairs=_by_names(card.pairs),
        lengths=sorted({time.tokens for row in card.rows for time in row.latency}),
        dtypes={row.name: plots.dtype_counts(row) for row in card.rows},
    )


def _by_names(pairs: tuple[Pair, ...]) -> dict[tuple[str, str], Pair]:
    """Give each pair under both orders of its names."""
    return {names: pair for pair in pairs for names in ((pair.first, pair.second), (pair.second, pair.first))}


def _fixed(value: float | None, digits: int) -> str:
    """Spell a number with so many digits behind the point, and one that is missing as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"
