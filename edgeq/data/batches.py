"""Define the interfaces of samples (the tokens of texts or the pixels of images) and of their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConfigError

PIXELS = "pixel_values"  # the one input of a model that takes images


def require_texts(inputs: Sequence[str], where: object, way_out: str) -> None:
    """Refuse a model that embeds images, for a stage that needs texts.

    Args:
        inputs: the names of the graph's inputs.
        where: the bundle, for the message.
        way_out: a sentence that says what to do instead.

    Raises:
        ConfigError: the model takes images.
    """
    if tuple(inputs) == (PIXELS,):
        raise ConfigError(f"{where}: embeds images, and this takes a model that embeds texts. {way_out}")


class AnyFeeds(Protocol):
    """Hold the input arrays of one batch."""

    @property
    def size(self) -> int:
        """Count the tokens of the batch, padding included, or its images."""
        ...

    def named(self, inputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Map the names of graph inputs to arrays."""
        ...


@dataclass(frozen=True)
class Batch:
    """Hold the feeds of a few samples of similar size, and the samples' positions in the whole set (`rows`)."""

    rows: tuple[int, ...]
    feeds: AnyFeeds


class Samples(Protocol):
    """Hold the samples to embed, ready to be fed: the tokens of texts, or the pixels of images."""

    def __len__(self) -> int:
        """Count the samples."""
        ...

    @property
    def longest(self) -> int:
        """Give the size of the largest sample, in the unit of `AnyFeeds.size`."""
        ...

    def chosen(self, rows: Sequence[int]) -> Self:
        """Give the samples at these positions."""
        ...

    def swept(self, vocabulary: int, seed: int) -> Self:
        """Make synthetic samples, which activate channels that are near zero on every real sample.

        Args:
            vocabulary: rows of the largest embedding table.
            seed: of the random numbers.
        """
        ...

    def batches(self, batch_size: int, most: int) -> list[Batch]:
        """Batch samples to embed them.

        Args:
            batch_size: the most samples in a batch.
            most: the most tokens in a batch, padding included.
        """
        ...

    def unpadded(self, most: int) -> list[Batch]:
        """Batch samples without padding, no batch larger than `most`, in the unit of `AnyFeeds.size`."""
        ...


@dataclass(frozen=True)
class PixelFeeds:
    """Hold one batch of images.

    Attributes:
        pixel_values: float32[batch, 3, height, width], rescaled and normalised.
        pixels: uint8 of the same shape, before that; None where numbers were drawn that no image has.
    """

    pixel_values: NDArray[np.float32]
    pixels: NDArray[np.uint8] | None = None

    @property
    def size(self) -> int:
        """Count the images."""
        return len(self.pixel_values)

    def named(self, inputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Map the names of graph inputs to arrays.

        Raises:
            ConfigError: the graph has other inputs than `pixel_values`.
        """
        if list(inputs) != [PIXELS]:
            raise ConfigError(f"the model reads {', '.join(inputs)}, and was given images. Give it texts.")
        return {PIXELS: self.pixel_values}
