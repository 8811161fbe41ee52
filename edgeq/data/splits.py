"""Decide which texts calibrate and which validate, and refuse a text that would do both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    pass

ItemT = TypeVar("ItemT")


def spread(texts: Sequence[ItemT], most: int | None) -> tuple[ItemT, ...]:
    """Give at most so many texts or images, evenly spread; all when there is no limit."""
    if most is None or len(texts) <= most:
        return tuple(texts)
    return tuple(texts[int(row)] for row in np.linspace(0, len(texts) - 1, most).round())
