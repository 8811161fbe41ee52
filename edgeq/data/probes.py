"""Make random texts and images: to compare a graph before and after a rewrite, and to check a model by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.data.batches import Batch, PixelFeeds, Samples
from edgeq.data.tokens import Feeds, Tokens

_LENGTHS = (3, 5, 9, 14, 16)  # of random texts, in tokens

_MOST_TOKENS = 24


def probe_feeds(vocabulary: int, longest: int, seed: int = 0) -> tuple[Feeds, ...]:
    """Make token batches on which different graphs give different vectors: single, batched, padded right, and full.

    Args:
        vocabulary: token ids are drawn from 0..vocabulary-1.
        longest: the model's limit in tokens.
        seed: of the random token ids.
    """
    rng = np.random.default_rng(seed)
    feeds = []
    for lengths in ((3,), (7, 2, 12), (min(33, longest), 5), (min(longest, 64), min(longest, 64))):
        width = max(lengths)
        mask = (np.arange(width)[None, :] < np.array(lengths)[:, None]).astype(np.int64)
        feeds.append(Feeds(rng.integers(0, vocabulary, mask.shape).astype(np.int64) * mask, mask))
    return tuple(feeds)


def text_probes(ids: Sequence[Sequence[int]]) -> tuple[Feeds, ...]:
    """Make token batches of real texts, for rewrites that count on what tokenizers write: one alone, and four padded.

    A model may count positions up to the padding token, which drawn ids could hold in the middle of a text.

    Args:
        ids: token ids of each text, special tokens included.

    Returns:
        Batches of at most 24 tokens a text, if there are such texts; none without texts.
    """
    by_length = sorted(filter(None, ids), key=len)
    chosen = [text for text in by_length if len(text) <= _MOST_TOKENS] or by_length[:1]
    places = np.unique(np.linspace(0, len(chosen) - 1, min(4, len(chosen))).round().astype(int)) if chosen else ()
    texts = [chosen[place] for place in places]
    return tuple(_padded(batch) for batch in (texts[-1:], texts) if batch)


def _padded(texts: Sequence[Sequence[int]]) -> Feeds:
    width = max(map(len, texts))
    rows = np.array([[*text, *[0] * (width - len(text))] for text in texts], np.int64)
    mask = np.array([[1] * len(text) + [0] * (width - len(text)) for text in texts], np.int64)
    return Feeds(rows, mask)


@dataclass(frozen=True)
class RandomImages:
    """Hold random images; see `Samples`.

    Attributes:
        pixel_values: float32[images, ...], normally distributed, as images are once they are normalised.
    """

    pixel_values: NDArray[np.float32]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.pixel_values)

    @property
    def longest(self) -> int:
        """Give the size of one image, as feeds count: 1."""
        return 1

    def chosen(self, rows: Sequence[int]) -> RandomImages:
        """Give the images at these positions."""
        return RandomImages(self.pixel_values[list(rows)])

    def swept(self, vocabulary: int, seed: int) -> RandomImages:
        """Give the same images with opposite signs."""
        return RandomImages(-self.pixel_values)

    def batches(self, batch_size: int, most: int) -> list[Batch]:
        """Batch the images in their order."""
        starts = range(0, len(self), batch_size)
        rows = [tuple(range(start, min(start + batch_size, len(self)))) for start in starts]
        return [Batch(each, PixelFeeds(self.pixel_values[list(each)])) for each in rows]

    def unpadded(self, most: int) -> list[Batch]:
        """Batch the images in their order, `most` at a time."""
        return self.batches(most, most)


def random_texts(ids: Sequence[int], longest: int, seed: int = 0) -> Samples:
    """Make a few texts of random tokens.

    Args:
        ids: the token ids to draw from.
        longest: the model's limit in tokens.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    lengths = [min(length, longest) for length in _LENGTHS]
    return Tokens(tuple(tuple(map(int, rng.choice(ids, length))) for length in lengths), 0, 0)


def random_images(sizes: Sequence[int], seed: int = 0) -> Samples:
    """Make a few random images.

    Args:
        sizes: of one image, as the model's input has them behind the batch.
        seed: of the draw.
    """
    shape = (len(_LENGTHS), *sizes)
    return RandomImages(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
