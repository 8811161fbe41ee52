"""Turn images into the pixels that a model reads: decode, resize, crop, rescale and normalise, with Pillow and numpy.

The steps are read from the model's own `preprocessor_config.json`. Exporting proves that the pixels are those of the
model's own image processor.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConfigError, ToolMissing, Unsupported
from edgeq.records import Record

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise ToolMissing("images need Pillow, which is not installed; pip install 'edgeq[images]'") from error

CONFIG = "preprocessor_config.json"

_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


class Preprocessing(Record):
    """Hold the steps that turn an image into the model's input; a step that is left out is None, 1 or 0."""

    shortest_edge: int | None  # resize the shorter edge to this number of pixels, or
    resize: tuple[int, int] | None  # resize to this height and width
    resample: int  # Pillow's number of the filter
    crop: tuple[int, int] | None  # cut out the middle of this height and width, black outside the image
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def height(self) -> int:
        """Give the height of the model's input."""
        return self._size()[0]

    @property
    def width(self) -> int:
        """Give the width of the model's input."""
        return self._size()[1]

    def _size(self) -> tuple[int, int]:
        size = self.crop or self.resize
        if size is None:
            raise Unsupported("images of any size are left as they are; a model of one image size is needed")
        return size

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop an image to uint8[3, height, width]."""
        image = image.convert("RGB")
        if self.shortest_edge is not None:
            short, long = sorted(image.size)
            other = int(self.shortest_edge * long / short)
            size = (self.shortest_edge, other) if image.width <= image.height else (other, self.shortest_edge)
            image = image.resize(size, Image.Resampling(self.resample))
        elif self.resize is not None:
            image = image.resize(self.resize[::-1], Image.Resampling(self.resample))
        if self.crop is not None:
            image = _middle(image, *self.crop)
        return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))

    def pixel_values(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rescale and normalise uint8[images, 3, height, width] to float32 of the same shape."""
        mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (self.mean, self.std))
        values: NDArray[np.float32] = (pixels.astype(np.float32) * np.float32(self.rescale_factor) - mean) / std
        return values

    def factor_and_offset(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give the factor and the offset of each colour channel, float64[3], that make pixel values of pixels."""
        mean, std = np.array(self.mean, np.float64), np.array(self.std, np.float64)
        return self.rescale_factor / std, -mean / std


def _middle(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the middle out of an image; pixels outside the image are black."""
    if image.height < height or image.width < width:
        wide = Image.new("RGB", (max(width, image.width), max(height, image.height)))
        wide.paste(image, (-(-(wide.width - image.width) // 2), -(-(wide.height - image.height) // 2)))
        image = wide
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read(path: Path, told_as: str = "") -> Preprocessing:
    """Read a model's `preprocessor_config.json`.

    Args:
        path: of the file.
        told_as: the path in messages, where `path` is a copy.

    Raises:
        ConfigError: the file does not exist, or is no JSON object.
        Unsupported: it asks for a step that edgeq does not know, or leaves images at different sizes.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not there; a model that takes images says in it how they are prepared") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore it from the model's origin") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a JSON {type(config).__name__} where an object is needed; restore it")
    unknown = sorted(name for name, value in config.items() if name.startswith("do_") and value and name not in _STEPS)
    unknown += [name for name in ("crop_pct", "rescale_offset", "include_top") if config.get(name)]
    if unknown:
        raise Unsupported(
            f"{told_as or path}: asks for {', '.join(unknown)}; edgeq resizes, crops, rescales and normalises only. "
            "Turn it off in the file if the model does without, or report the model."
        )
    return _parsed(told_as or str(path), config)


def _parsed(where: str, config: dict[str, Any]) -> Preprocessing:
    size = config.get("size") if config.get("do_resize") else None
    size = {"shortest_edge": size} if isinstance(size, int) else size or {}
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {}
    size, crop = ({key: value for key, value in given.items() if value is not None} for given in (size, crop))
    fits = set(size) in ({"shortest_edge"}, {"height", "width"}, set()) and set(crop) in ({"height", "width"}, set())
    if not fits or not (crop or "height" in size):
        raise Unsupported(
            f"{where}: size is {size}, crop_size {crop}: images of different shapes reach the model so. A height and "
            'a width, or "shortest_edge" with a crop_size, is needed: set them in the file.'
        )
    is_normalized = bool(config.get("do_normalize"))
    return Preprocessing(
        shortest_edge=size.get("shortest_edge"),
        resize=(size["height"], size["width"]) if "height" in size else None,
        resample=int(config.get("resample", Image.Resampling.BILINEAR)),
        crop=(crop["height"], crop["width"]) if crop else None,
        rescale_factor=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale") else 1.0,
        mean=tuple(config["image_mean"]) if is_normalized else (0.0, 0.0, 0.0),
        std=tuple(config["image_std"]) if is_normalized else (1.0, 1.0, 1.0),
    )


def decode(picture: object, name: str) -> Image.Image:
    """Decode a picture to a Pillow image in RGB, rotated as its EXIF orientation says.

    Args:
        picture: a path, a Pillow image, or uint8[height, width] or [height, width, 3].
        name: for messages.

    Raises:
        ConfigError: `picture` is none of these, or cannot be decoded.
    """
    if isinstance(picture, np.ndarray):
        is_image = picture.dtype == np.uint8 and picture.size and picture.shape[2:] in ((), (3,)) and picture.ndim > 1
        if not is_image:
            raise ConfigError(
                f"{name}: is {picture.dtype}{list(picture.shape)}; uint8[height, width, 3] is needed, with values "
                "from 0 to 255."
            )
        return Image.fromarray(picture).convert("RGB")
    if not isinstance(picture, str | Path | Image.Image):
        raise ConfigError(
            f"{name}: is of type {type(picture).__name__}; a path, a Pillow image or a uint8 array is needed."
        )
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        return (ImageOps.exif_transpose(image) or image).convert("RGB")
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such file") from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name}: cannot be decoded as an image ({error}); replace or remove it") from error


def sha256_image(image: Image.Image) -> str:
    """Hash an image's size and pixels, which do not depend on its file format."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def test_card(seed: int = 0) -> Image.Image:
    """Draw an image with smooth and sharp parts, larger than most models' input, to compare preprocessings on."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:371, 0:523]
    waves = np.stack([np.sin(rows / (7 + 9 * k)) + np.cos(columns / (23 - 7 * k)) for k in range(3)], axis=-1)
    noise = rng.integers(-20, 21, waves.shape)
    return Image.fromarray(np.clip(127 + 60 * waves + noise, 0, 255).astype(np.uint8))
