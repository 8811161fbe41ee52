"""Decide which images calibrate and which validate; refuse one that would do both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.data.images import ImageFile, read_folder
from edgeq.data.plans import FEWEST_CALIBRATION, FEWEST_VALIDATION
from edgeq.data.splits import sample, shared_items, split
from edgeq.errors import ConfigError


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
    if len(given) < FEWEST_CALIBRATION or len(compared) < FEWEST_VALIDATION:
        raise ConfigError(
            f"{folder}: {len(given)} different images are left to calibrate and {len(compared)} to validate; "
            f"{FEWEST_CALIBRATION} and {FEWEST_VALIDATION} are needed. Give more with --images, more --samples, or a "
            "folder with --validation."
        )
    return ImagePlan(tuple(given), tuple(compared), folder.name, compared_origin)


def _refuse_overlap(given: Sequence[ImageFile], folder: Path, compared: Sequence[ImageFile], validation: Path) -> None:
    names = {item.sha256: item.name for item in given}
    both = [(names[item.sha256], item.name) for item in compared if item.sha256 in names]
    if both:
        raise shared_items("images", str(folder), str(validation), [f"{one} and {two}" for one, two in both])
