"""Decide which texts calibrate and which validate, and refuse a text that would do both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgeq.data.text_files import deduplicate, default_texts, read_texts, refuse_overlap, sample, split
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    from edgeq.data.images import ImagePlan

ItemT = TypeVar("ItemT")

FEWEST_CALIBRATION = 16
FEWEST_VALIDATION = 16


@dataclass(frozen=True)
class TextPlan:
    """Hold the texts of an export.

    Attributes:
        calibration: observed.
        validation: compared on; shares no text with `calibration`.
        origin: what the user named, or "default".
        validation_origin: the same for the validation texts.
    """

    calibration: tuple[str, ...]
    validation: tuple[str, ...]
    origin: str
    validation_origin: str


def plan_texts(
    texts: Path | None,
    column: str | None,
    validation: Path | None,
    evaluation: tuple[Path, ...],
    samples: int | None,
    seed: int,
) -> TextPlan:
    """Read, split and sample the texts of an export.

    Without `texts` the default sets serve. With it, and without `validation`, a fifth of the texts, chosen by the hash
    of each text, validates.

    Raises:
        ConfigError: a file cannot be read, too few texts are left, or a text stands on both sides.
    """
    default_calibration, default_validation = default_texts()
    given = deduplicate(read_texts(texts or default_calibration, column if texts else None))
    origin = texts.name if texts else "default"
    if validation is not None or texts is None:
        compared = deduplicate(read_texts(validation or default_validation, column if validation else None))
        compared_origin = validation.name if validation else "default"
        refuse_overlap(
            given,
            str(texts or "the default calibration texts"),
            compared,
            str(validation or "the default validation texts"),
        )
    else:
        given, compared = split(given)
        compared_origin = f"{origin} (a fifth, by hash)"
    for file in evaluation:
        others = read_texts(file, column)
        refuse_overlap(given, str(texts or "the default calibration texts"), others, str(file))
    chosen = sample(given, samples, seed) if samples is not None else given
    if len(chosen) < FEWEST_CALIBRATION:
        raise ConfigError(
            f"{len(chosen)} calibration texts are left; {FEWEST_CALIBRATION} are needed. "
            "Give more with --texts, or more --samples."
        )
    if len(compared) < FEWEST_VALIDATION:
        raise ConfigError(
            f"{validation or texts}: {len(compared)} validation texts are left; {FEWEST_VALIDATION} are needed. "
            "Give more texts, or a file with --validation."
        )
    return TextPlan(tuple(chosen), tuple(compared), origin, compared_origin)


def spread(texts: Sequence[ItemT], most: int | None) -> tuple[ItemT, ...]:
    """Give at most so many texts or images, evenly spread; all when there is no limit."""
    if most is None or len(texts) <= most:
        return tuple(texts)
    return tuple(texts[int(row)] for row in np.linspace(0, len(texts) - 1, most).round())


def spread_validation(plan: TextPlan | ImagePlan, most: int | None) -> TextPlan | ImagePlan:
    """Keep at most so many of a plan's validation texts or images."""
    if isinstance(plan, TextPlan):
        return replace(plan, validation=spread(plan.validation, most))
    return replace(plan, validation=spread(plan.validation, most))
