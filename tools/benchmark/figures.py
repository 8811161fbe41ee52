"""Hold what was measured: a number, or a blank with its reason. Nothing is ever estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]  # JSON once `plain` has been through it


@dataclass(frozen=True)
class Blank:
    """Stand where a figure could not be had, with the reason."""

    reason: str


def plain(figures: Any) -> Any:
    """Turn figures into what JSON can carry: a blank becomes {"blank": reason}."""
    if isinstance(figures, Blank):
        return {"blank": figures.reason}
    if isinstance(figures, Mapping):
        return {str(key): plain(value) for key, value in figures.items()}
    return [plain(value) for value in figures] if isinstance(figures, list | tuple) else figures


def restored(figures: Any) -> Any:
    """Turn what `plain` made, read from JSON, into figures again."""
    if isinstance(figures, Mapping):
        if set(figures) == {"blank"}:
            return Blank(figures["blank"])
        return {key: restored(value) for key, value in figures.items()}
    return [restored(value) for value in figures] if isinstance(figures, list) else figures


def at(figures: Figures, *path: str) -> Any:
    """Give the figure at a path; a blank if a part of the path is one, or was not measured."""
    found: Any = figures
    for key in path:
        if isinstance(found, Blank):
            return found
        if key not in found:
            return Blank("not measured")
        found = found[key]
    return found
