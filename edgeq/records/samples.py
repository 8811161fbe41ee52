"""Describe the texts or images that calibrate or validate, without them."""

from __future__ import annotations

from edgeq.records.record import Record, Sha256


class TextSet(Record):
    """Describe a set of texts by hash and counts, without the texts."""

    origin: str  # the user's file name, or "default"
    sha256: Sha256  # over the texts in order
    count: int
    tokens: int
    truncated: int  # number of texts cut at the model's limit


class ImageSet(Record):
    """Describe a set of images by hash and counts, without the images."""

    origin: str  # name of the user's folder
    sha256: Sha256  # over the pixels in order, resized and cropped
    count: int
    height: int
    width: int
