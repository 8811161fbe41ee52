"""Say what stages need of the things that a model embeds, whether they are texts or images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConfigError

PIXELS = "pixel_values"  # the one input of a model that takes images


def require_texts(inputs: Sequence[str], where: object, way_out: str) -> None:
    """Refuse a model of images where only texts will do.

    Args:
        inputs: of its graph.
        where: the bundle, for the message.
        way_out: what to do instead: a sentence.

    Raises:
        ConfigError: the model takes images.
    """
    if tuple(inputs) == (PIXELS,):
        raise ConfigError(f"{where}: embeds images, and this takes a model that embeds texts. {way_out}")


class AnyFeeds(Protocol):
    """Hold one batch of a model's inputs."""

    @property
    def size(self) -> int:
        """Count the tokens, padding included, or the images."""
        ...

    def named(self, inputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Give the arrays by graph input name."""
        ...


@dataclass(frozen=True)
class Batch:
    """Hold the feeds of a few samples of like size, and which samples they are (`rows`: positions in the input)."""

    rows: tuple[int, ...]
    feeds: AnyFeeds


class Samples(Protocol):
    """Hold what is to be embedded, ready to be fed: the tokens of texts, or the pixels of images."""

    def __len__(self) -> int:
        """Count the samples."""
        ...

    @property
    def longest(self) -> int:
        """Give the size of the largest sample, as `AnyFeeds.size` counts."""
        ...

    def chosen(self, rows: Sequence[int]) -> Self:
        """Give the samples at these positions."""
        ...

    def swept(self, vocabulary: int, seed: int) -> Self:
        """Make samples that wake what real ones leave asleep.

        Args:
            vocabulary: rows of the largest table that the model looks up.
            seed: of the draw.
        """
        ...

    def batches(self, batch_size: int, most: int) -> list[Batch]:
        """Batch samples to embed them.

        Args:
            batch_size: most samples in a batch.
            most: most tokens in a batch, padding included.
        """
        ...

    def unpadded(self, most: int) -> list[Batch]:
        """Batch samples without padding, no batch larger than `most`, as `AnyFeeds.size` counts."""
        ...


@dataclass(frozen=True)
class PixelFeeds:
    """Hold one batch of images.

    Attributes:
        pixel_values: float32[batch, 3, height, width], rescaled and normalised.
    """

    pixel_values: NDArray[np.float32]

    @property
    def size(self) -> int:
        """Count the images."""
        return len(self.pixel_values)

    def named(self, inputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Give the arrays by graph input name.

        Raises:
            ConfigError: the graph wants something else than images.
        """
        if list(inputs) != [PIXELS]:
            raise ConfigError(f"the model reads {', '.join(inputs)}, and was given images. Give it texts.")
        return {PIXELS: self.pixel_values}
