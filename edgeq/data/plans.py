"""Decide which texts or images calibrate and which validate; refuse one that would do both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeq.data.images import ImageFile, read_folder
from edgeq.data.splits import deduplicate, evenly_spaced, refuse_overlap, sample, sha256_text, shared_items, split
from edgeq.data.text_files import default_texts, read_texts
from edgeq.errors import ConfigError

FEWEST_CALIBRATION = 16
_FEWEST_VALIDATION = 16


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
    chosen by the hash of each text.

    Raises:
        ConfigError: a file cannot be read, too few texts are left, or a text would both calibrate and validate.
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
    if len(compared) < _FEWEST_VALIDATION:
        raise ConfigError(
            f"{validation or texts}: {len(compared)} validation texts are left; {_FEWEST_VALIDATION} are needed. "
            "Give more texts, or a file with --validation."
        )
    return TextPlan(tuple(chosen), tuple(compared), origin, compared_origin)


def limit_validation(plan: TextPlan | ImagePlan, most: int | None) -> TextPlan | ImagePlan:
    """Keep at most `most` validation texts or images of a plan, evenly spaced in their order; None keeps all."""
    rows = evenly_spaced(len(plan.validation), most)
    if isinstance(plan, TextPlan):
        return replace(plan, validation=tuple(plan.validation[row] for row in rows))
    return replace(plan, validation=tuple(plan.validation[row] for row in rows))


@dataclass(frozen=True)
class ImagePlan:
    """Hold the image files of an export.

    Attributes:
        calibration: images on which ranges are observed.
        validation: images on which the artifact is compared with FP32; none has the pixels of one in `calibration`.
        origin: the name of the folder.
        validation_origin: the same for the validation images.
    """

    calibration: tuple[ImageFile, ...]
    validation: tuple[ImageFile, ...]
    origin: str
    validation_origin: str


def plan_images(folder: Path, validation: Path | None, samples: int | None, seed: int) -> ImagePlan:
    """Read, split and sample the images of an export.

    Without a folder of validation images a fifth of the images, chosen by the hash of each one's pixels, validates.

    Raises:
        ConfigError: a folder or file cannot be read, too few images are left, or one would both calibrate and validate.
    """
    given = read_folder(folder)
    if validation is not None:
        compared, compared_origin = read_folder(validation), validation.name
        _refuse_overlap(given, folder, compared, validation)
    else:
        given, compared = split(given, lambda item: bytes.fromhex(item.sha256))
        compared_origin = f"{folder.name} (a fifth, by hash)"
    if samples is not None:
        given = sample(given, samples, seed)
    if len(given) < FEWEST_CALIBRATION or len(compared) < _FEWEST_VALIDATION:
        raise ConfigError(
            f"{folder}: {len(given)} different images are left to calibrate and {len(compared)} to validate; "
            f"{FEWEST_CALIBRATION} and {_FEWEST_VALIDATION} are needed. Give more with --images, more --samples, or a "
            "folder with --validation."
        )
    return ImagePlan(tuple(given), tuple(compared), folder.name, compared_origin)


def _refuse_overlap(given: Sequence[ImageFile], folder: Path, compared: Sequence[ImageFile], validation: Path) -> None:
    names = {item.sha256: item.name for item in given}
    both = [(names[item.sha256], item.name) for item in compared if item.sha256 in names]
    if both:
        raise shared_items("images", str(folder), str(validation), [f"{one} and {two}" for one, two in both])
