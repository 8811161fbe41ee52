"""Prepare the texts or images of an export as the model's own tokenizer or preprocessing does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.data.batches import Samples
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import text_set
from edgeq.records import ImageSet, TextSet

if TYPE_CHECKING:
    from edgeq.data.images import ImageFile
    from edgeq.data.plans import ImagePlan, TextPlan

    Plan = TextPlan | ImagePlan
    Items = Sequence[str] | Sequence[ImageFile]


@dataclass(frozen=True)
class Prepared:
    """Hold samples, what to call each of them (a text's own words, an image's file name), and their record."""

    samples: Samples
    names: tuple[str, ...]
    record: TextSet | ImageSet


def prepare(items: Items, origin: str, config: Path, limit: int) -> Prepared:
    """Prepare texts or image files.

    Args:
        items: of a plan.
        origin: what the user named.
        config: the folder with the model's tokenizer or preprocessing.
        limit: texts are cut at so many tokens.

    Raises:
        ConfigError: an image cannot be decoded, or the folder lacks a file.
    """
    texts = [item for item in items if isinstance(item, str)]
    if texts:
        tokens = Tokenizer.from_file(config / "tokenizer.json", limit).encode(texts)
        return Prepared(tokens, tuple(texts), text_set(origin, texts, tokens))
    from edgeq.data import image_preprocessing, images  # here: texts need no Pillow

    files = [item for item in items if not isinstance(item, str)]
    made = images.prepared(files, image_preprocessing.read(config / image_preprocessing.CONFIG))
    return Prepared(made, tuple(item.name for item in files), made.record(origin))


def identities(items: Items) -> list[str]:
    """Give what decides the vectors of each: a text itself, or the hash of what an image shows."""
    return [item if isinstance(item, str) else item.sha256 for item in items]
