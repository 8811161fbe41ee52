"""List the image files of a folder, and hold images as batches of pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.data import image_preprocessing
from edgeq.data.batches import Batch, PixelFeeds
from edgeq.data.image_preprocessing import Preprocessing
from edgeq.errors import ConfigError
from edgeq.records import ImageSet

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Images:
    """Hold images, resized and cropped; each batch is normalised when it is made.

    Attributes:
        pixels: uint8[images, 3, height, width].
        preprocessing: rescales and normalises the pixels.
    """

    pixels: NDArray[np.uint8]
    preprocessing: Preprocessing

    @classmethod
    def of(cls, pictures: Sequence[object], names: Sequence[str], how: Preprocessing) -> Images:
        """Prepare pictures: paths, Pillow images or uint8 arrays.

        Raises:
            ConfigError: one cannot be decoded.
        """
        pixels = np.empty((len(pictures), 3, how.height, how.width), np.uint8)
        for row, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            pixels[row] = how.pixels(image_preprocessing.decode(picture, name))
        return cls(pixels, how)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.pixels)

    @property
    def longest(self) -> int:
        """Give the size of one image in the unit of `PixelFeeds.size`: 1."""
        return 1

    def chosen(self, rows: Sequence[int]) -> Images:
        """Give the images at these positions."""
        return Images(self.pixels[list(rows)], self.preprocessing)

    def swept(self, vocabulary: int, seed: int) -> Images:
        """Make synthetic images: invert the real ones and permute their colour channels; edges stay."""
        rng = np.random.default_rng(seed)
        turned = [255 - pixels[rng.permutation(3)] for pixels in self.pixels]
        return Images(np.stack(turned), self.preprocessing)

    def batches(self, batch_size: int, most: int) -> list[Batch]:
        """Batch the images in their order; `most` is ignored, because images have no tokens."""
        starts = range(0, len(self), batch_size)
        return [self._batch(tuple(range(start, min(start + batch_size, len(self))))) for start in starts]

    def unpadded(self, most: int) -> list[Batch]:
        """Batch the images in their order, `most` at a time."""
        return self.batches(most, most)

    def _batch(self, rows: tuple[int, ...]) -> Batch:
        pixels = self.pixels[list(rows)]
        return Batch(rows, PixelFeeds(self.preprocessing.pixel_values(pixels), pixels))

    def record(self, origin: str) -> ImageSet:
        """Describe the images by a hash of their pixels, their number and size."""
        shape = self.pixels.shape
        digest = hashlib.sha256(f"{shape}:".encode() + self.pixels.tobytes()).hexdigest()
        return ImageSet(origin=origin, sha256=digest, count=shape[0], height=shape[2], width=shape[3])


@dataclass(frozen=True)
class ImageFile:
    """Name an image file, with the hash of its pixels."""

    path: Path
    name: str
    sha256: str


def image_paths(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted by path.

    Raises:
        ConfigError: the folder does not exist, or holds no images.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; a folder of image files is needed")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not paths:
        raise ConfigError(f"{folder}: holds no image ({', '.join(sorted(_SUFFIXES))})")
    return paths


def read_folder(folder: Path) -> list[ImageFile]:
    """List the images below a folder, sorted by path; of images with the same pixels, the first only.

    Raises:
        ConfigError: the folder does not exist or holds no images, or one cannot be decoded.
    """
    found: dict[str, ImageFile] = {}
    for path in image_paths(folder):
        sha256 = image_preprocessing.sha256_image(image_preprocessing.decode(path, str(path)))
        found.setdefault(sha256, ImageFile(path, path.relative_to(folder).as_posix(), sha256))
    return list(found.values())


def load_images(paths: Sequence[Path], how: Preprocessing) -> Images:
    """Decode, resize and crop image files.

    Raises:
        ConfigError: one cannot be decoded.
    """
    return Images.of(paths, [str(path) for path in paths], how)
