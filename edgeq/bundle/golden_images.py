"""Write and read the golden images, resized and cropped (uint8), with FP32's and the artifact's vectors.

The file also holds a test card, drawn by edgeq and resized by the bundle's preprocessing: another version of Pillow or
a changed configuration gives other pixels. So no photograph has to be shipped at its full size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle.golden import AGAIN, TEXTS, VECTORS, not_finite, read_arrays, read_lines, write_arrays
from edgeq.errors import BundleCorrupt, EdgeqError

if TYPE_CHECKING:
    from edgeq.data.batches import Samples

_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "codes": (np.uint8, 4), "test_card": (np.uint8, 3), "reference": (np.float32, 2), "embeddings": (np.float32, 2),
}  # fmt: skip


@dataclass(frozen=True)
class GoldenImages:
    """Hold the golden images with their vectors.

    Attributes:
        texts: the images' file names.
        codes: uint8[images, 3, height, width], resized and cropped, neither rescaled nor normalised.
        test_card: uint8[3, height, width], the test card resized and cropped alike.
        reference: float32[images, dim], FP32's vectors.
        embeddings: float32[images, dim], the artifact's vectors; None when it was not run.
    """

    texts: tuple[str, ...]
    codes: NDArray[np.uint8]
    test_card: NDArray[np.uint8]
    reference: NDArray[np.float32]
    embeddings: NDArray[np.float32] | None


def golden_images(
    config: Path,
    images: Samples,
    names: Sequence[str],
    reference: NDArray[np.float32],
    embeddings: NDArray[np.float32] | None,
) -> GoldenImages:
    """Make golden images from prepared ones, and preprocess the test card with the same configuration.

    Raises:
        EdgeqError: the samples are no images.
    """
    from edgeq.data import image_preprocessing
    from edgeq.data import images as pictures

    if not isinstance(images, pictures.Images):
        raise EdgeqError("golden images: given something else. This is a defect of edgeq; please report it.")
    card = image_preprocessing.read(config / image_preprocessing.CONFIG).pixels(image_preprocessing.test_card())
    return GoldenImages(tuple(names), images.pixels, card, reference, embeddings)


def write_golden_images(directory: Path, golden: GoldenImages) -> None:
    """Write `golden.npz` and `golden.jsonl`; the same data gives the same bytes.

    Raises:
        EdgeqError: shapes or dtypes of the arrays do not fit together.
    """
    problem = _problem(golden)
    if problem is not None:
        raise EdgeqError(f"golden images: {problem}. This is a defect of edgeq; please report it.")
    lines = [json.dumps({"image": name}, ensure_ascii=False) + "\n" for name in golden.texts]
    (directory / TEXTS).write_text("".join(lines), encoding="utf-8", newline="\n")
    held = {name: array for name in _ARRAYS if (array := getattr(golden, name)) is not None}
    write_arrays(directory / VECTORS, held)


def read_golden_images(directory: Path) -> GoldenImages:
    """Read the golden images of a bundle; nothing is unpickled.

    Raises:
        BundleCorrupt: a file is missing or malformed, or the two do not fit together.
    """
    names = read_lines(directory / TEXTS, "image")
    arrays = read_arrays(directory / VECTORS, tuple(_ARRAYS), optional="embeddings")
    golden = GoldenImages(names, arrays["codes"], arrays["test_card"], arrays["reference"], arrays.get("embeddings"))
    problem = _problem(golden) or not_finite(golden.reference, golden.embeddings)
    if problem is not None:
        raise BundleCorrupt(f"{directory / VECTORS}: {problem}. {AGAIN}")
    return golden


def _problem(golden: GoldenImages) -> str | None:
    """Say why the arrays do not fit together, or None."""
    count = len(golden.texts)
    if count == 0:
        return "no images; at least one is needed"
    for name, (dtype, axes) in _ARRAYS.items():
        array = getattr(golden, name)
        if array is None:
            continue
        if array.dtype != dtype or array.ndim != axes or (name != "test_card" and len(array) != count):
            return f"{name} is {array.dtype}{list(array.shape)}; {np.dtype(dtype).name} with {axes} axes is needed"
    if golden.codes.shape[1:] != golden.test_card.shape:
        return f"test_card has shape {golden.test_card.shape}, the images {golden.codes.shape[1:]}"
    if golden.embeddings is not None and golden.reference.shape != golden.embeddings.shape:
        return f"embeddings have shape {golden.embeddings.shape}, FP32's {golden.reference.shape}"
    return None
