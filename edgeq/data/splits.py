"""Split, sample and thin out texts or images, and refuse texts that would both calibrate and validate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from edgeq.errors import ConfigError

_SHOWN = 5

_ItemT = TypeVar("_ItemT")


def evenly_spaced(count: int, most: int | None) -> list[int]:
    """Choose at most `most` of the positions 0 to count - 1, evenly spaced, the first and the last among them.

    Args:
        count: how many positions there are.
        most: None chooses all.
    """
    chosen = count if most is None else min(most, count)
    return [int(position) for position in np.linspace(0, count - 1, chosen).round()]


def deduplicate(texts: Sequence[str]) -> list[str]:
    """Keep the first of equal texts."""
    return list(dict.fromkeys(texts))


def sha256_text(text: str) -> bytes:
    """Hash a text with SHA-256."""
    return hashlib.sha256(text.encode()).digest()


def split(items: Sequence[_ItemT], sha256: Callable[[_ItemT], bytes]) -> tuple[list[_ItemT], list[_ItemT]]:
    """Split texts or images by their hashes: four fifths to calibrate and a fifth to validate.

    Args:
        items: the texts or images.
        sha256: gives the hash of an item.
    """
    parts: tuple[list[_ItemT], list[_ItemT]] = ([], [])
    for item in items:
        parts[sha256(item)[0] % 5 == 0].append(item)
    return parts


def sample(items: Sequence[_ItemT], count: int, seed: int) -> list[_ItemT]:
    """Draw texts or images without replacement and keep their order; all of them when there are not more."""
    if count >= len(items):
        return list(items)
    rows = np.random.default_rng(seed).choice(len(items), count, replace=False)
    return [items[row] for row in sorted(rows)]


def shared_texts(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int, str]]:
    """Find texts that are in both lists, whatever their case and spacing.

    Returns:
        (position in `first`, position in `second`, text) of each, positions counted from 1.
    """
    positions = {_plain(text): number for number, text in reversed(list(enumerate(first, start=1)))}
    return [
        (positions[_plain(text)], number, text)
        for number, text in enumerate(second, start=1)
        if _plain(text) in positions
    ]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def refuse_overlap(first: Sequence[str], first_name: str, second: Sequence[str], second_name: str) -> None:
    """Refuse texts that are in both lists.

    Raises:
        ConfigError: some are; the message shows the texts and their positions.
    """
    both = shared_texts(first, second)
    if both:
        raise shared_items(
            "texts", first_name, second_name, [f'text {one} and text {two}: "{text[:80]}"' for one, two, text in both]
        )


def shared_items(kind: str, first_name: str, second_name: str, lines: Sequence[str]) -> ConfigError:
    """Make the error for texts or images that would both calibrate and validate.

    Args:
        kind: "texts" or "images".
        first_name: of the first file or folder.
        second_name: of the second.
        lines: one for each item that is in both.
    """
    shown = "\n".join(f"  - {line}" for line in lines[:_SHOWN])
    more = f"\n  … and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ConfigError(
        f"{len(lines)} {kind} stand in {first_name} and in {second_name}, which flatters the figures:\n{shown}{more}\n"
        "Remove them from one of the two."
    )
