"""Tokenise the texts or preprocess the images of an export as the model itself does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.data.batches import Samples
from edgeq.data.plans import TextPlan
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import text_set
from edgeq.records import ImageSet, TextSet

if TYPE_CHECKING:
    from edgeq.data.image_plans import ImagePlan
    from edgeq.data.images import ImageFile

    Plan = TextPlan | ImagePlan
    Items = Sequence[str] | Sequence[ImageFile]


@dataclass(frozen=True)
class Prepared:
    """Hold samples, a name for each (a text itself, or an image's file name), and the record of the whole set."""

    samples: Samples
    names: tuple[str, ...]
    record: TextSet | ImageSet


def prepare(items: Items, origin: str, config: Path, limit: int) -> Prepared:
    """Tokenise texts, or decode and preprocess image files.

    Args:
        items: the calibration or validation part of a plan.
        origin: the name of the user's file or folder, or "default".
        config: the folder with the model's tokenizer or preprocessing.
        limit: the most tokens of a text; longer ones are cut.

    Raises:
        ConfigError: an image cannot be decoded, or the folder lacks a file.
    """
    texts = [item for item in items if isinstance(item, str)]
    if texts:
        tokens = Tokenizer.from_file(config / "tokenizer.json", limit).encode(texts)
        return Prepared(tokens, tuple(texts), text_set(origin, texts, tokens))
    return prepare_images([(item.path, item.name) for item in items if not isinstance(item, str)], origin, config)


def prepare_images(files: Sequence[tuple[Path, str]], origin: str, config: Path) -> Prepared:
    """Decode and preprocess image files.

    Args:
        files: path and name of each.
        origin: the name of the user's folder.
        config: the folder with the model's preprocessing.

    Raises:
        ConfigError: an image cannot be decoded, or the folder lacks a file.
    """
    from edgeq.data import image_preprocessing, images  # here: texts need no Pillow

    how = image_preprocessing.read(config / image_preprocessing.CONFIG)
    made = images.load_images([path for path, _ in files], how)
    return Prepared(made, tuple(name for _, name in files), made.record(origin))
