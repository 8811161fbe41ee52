"""Embed images with a bundle's artifact: resize, crop, normalise, run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle.embedder import Embedder, require_batch_size
from edgeq.data.image_preprocessing import Preprocessing
from edgeq.data.images import Images
from edgeq.data.sessions import Session, embed_batches
from edgeq.data.tokens import batches
from edgeq.errors import ConfigError
from edgeq.records import Manifest


class ImageEmbedder(Embedder):
    """Embed images with a loaded artifact and its preprocessing; `edgeq.load` makes one."""

    def __init__(
        self, session: Session, preprocessing: Preprocessing, manifest: Manifest, codecs: Path | None = None
    ) -> None:
        """Take a session of the bundle's artifact, or of its FP32 model.

        Args:
            session: the loaded model.
            preprocessing: the bundle's.
            manifest: the bundle's.
            codecs: the file of the bundle with the statistics that codes need.
        """
        self._codecs = codecs
        self._session = session
        self._preprocessing = preprocessing
        self.manifest = manifest
        self.dim = manifest.source.dim
        self.max_sequence = manifest.source.max_sequence

    def encode(
        self,
        texts: Sequence[object],
        batch_size: int = 32,
        prompt_name: str | None = None,
        prompt: str | None = None,
        codec: str | Path | None = None,
    ) -> NDArray[Any]:
        """Embed images, resized, cropped and normalised as the model's own processor does.

        Args:
            texts: the images: paths, Pillow images, or uint8[height, width, 3] (or [height, width]), of any sizes.
            batch_size: the most images prepared and run at once.
            prompt_name: must be None: images have no prompt.
            prompt: must be None.
            codec: give codes instead of floats; see `Embedder.encode`.

        Returns:
            float32[images, dim], in the order of the images, or what the codec gives.

        Raises:
            ConfigError: `texts` is a single image, an image cannot be decoded, the batch size is no positive integer,
                or a prompt is given.
        """
        if isinstance(texts, str | Path) or not isinstance(texts, Sequence):
            raise ConfigError("encode: a list of images is needed. Write encode([image]).")
        if prompt_name is not None or prompt is not None:
            raise ConfigError(f"encode: a prompt is given, {prompt_name or prompt!r}; images have none. Leave it out.")
        require_batch_size(batch_size)
        return self._coded(lambda: self._embed_images(texts, batch_size), codec)

    def _embed_images(self, texts: Sequence[object], batch_size: int) -> NDArray[np.float32]:
        """Prepare and run images, a batch at a time."""
        made = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            names = [_name(image, start + row) for row, image in enumerate(some)]
            images = Images.of(some, names, self._preprocessing)
            made.append(embed_batches(self._session, batches(images, batch_size=batch_size), len(some)))
        return np.concatenate(made)


def _name(image: object, row: int) -> str:
    """Name an image for messages, by its position and path."""
    return f"encode: images[{row}]" + (f" ({image})" if isinstance(image, str | Path) else "")
