"""Decide which texts calibrate and which validate; refuse one that would do both, and fill up too few."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.data.splits import deduplicate, refuse_overlap, sample, sha256_text, shared_texts, split
from edgeq.data.text_files import default_texts, read_texts
from edgeq.errors import ConfigError

FEWEST_CALIBRATION = 16
FEWEST_VALIDATION = 16
FEWEST_JUDGED_TEXTS = 256  # that measures against FP32 are judged on
DEFAULT = "default"  # the origin of edgeq's own texts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextPlan:
    """Hold the texts of an export.

    Attributes:
        calibration: texts on which ranges are observed.
        validation: texts on which the artifact is compared with FP32; none is in `calibration`.
        origin: the name of the user's file, or "default".
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

    Without `texts` the default sets are used. With `texts` and without `validation`, a fifth of the texts validates,
    chosen by the hash of each text. Fewer than 256 validation texts are filled up from the default set, with a warning:
    a gate is judged on no fewer.

    Raises:
        ConfigError: a file cannot be read, too few texts are left, or a text would both calibrate and validate.
    """
    default_calibration, default_validation = default_texts()
    given = deduplicate(read_texts(texts or default_calibration, column if texts else None))
    origin = texts.name if texts else DEFAULT
    if validation is not None or texts is None:
        compared = deduplicate(read_texts(validation or default_validation, column if validation else None))
        compared_origin = validation.name if validation else DEFAULT
        refuse_overlap(
            given,
            str(texts or "the default calibration texts"),
            compared,
            str(validation or "the default validation texts"),
        )
    else:
        given, compared = split(given, sha256_text)
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
    if len(compared) < FEWEST_JUDGED_TEXTS:
        _log.warning(
            "%s: %d validation texts; a gate is judged on at least %d, so default texts are added. Give more of your "
            "own with --texts or --validation.", compared_origin, len(compared), FEWEST_JUDGED_TEXTS,
        )  # fmt: skip
        compared, compared_origin = filled_up(compared, compared_origin, given)
    return TextPlan(tuple(chosen), tuple(compared), origin, compared_origin)


def filled_up(own: Sequence[str], origin: str, calibration: Sequence[str] = ()) -> tuple[list[str], str]:
    """Add default texts to fewer than 256 validation texts until there are enough to judge; none that calibrates.

    Args:
        own: the user's validation texts.
        origin: of them.
        calibration: texts that do not validate.

    Returns:
        All the texts, and the origin of all.
    """
    if len(own) >= FEWEST_JUDGED_TEXTS:
        return list(own), origin
    default = read_texts(default_texts()[1])
    taken = {row for _, row, _ in shared_texts([*own, *calibration], default)}
    more = [text for row, text in enumerate(default, start=1) if row not in taken][: FEWEST_JUDGED_TEXTS - len(own)]
    return [*own, *more], f"{origin}, and {len(more)} default texts"
