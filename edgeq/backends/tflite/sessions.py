"""Run a .tflite file in a child process: each text in the smallest bucket that holds it, or one image at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.data.batches import AnyFeeds, PixelFeeds
from edgeq.data.sessions import Embeddings, embed_by_bucket
from edgeq.data.tokens import fitted, rows_by_bucket, token_feeds
from edgeq.errors import ConfigError
from edgeq.system.child_server import pack
from edgeq.system.worker import Worker, unpack_reply

SIGNATURE, IMAGE = "seq_{}", "image"
RAW_PIXELS = "pixels"  # the input of a file that takes images


class TfliteSession:
    """Run a .tflite file in a child process, each text in the smallest bucket that holds it."""

    def __init__(self, worker: Worker, buckets: tuple[int, ...], params: tuple[float, int]) -> None:
        """Take a child process that has loaded the file.

        Args:
            worker: the child.
            buckets: the file's sequence lengths.
            params: scale and zero point of the vectors.
        """
        self._worker = worker
        self._buckets = sorted(buckets)
        self._scale, self._zero_point = params

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the sentence embeddings, float32[batch, dim], dequantised.

        A text alone runs at its padded length; in a batch each text is cut back to its own tokens first.

        Raises:
            ConfigError: a text is longer than the largest bucket.
        """
        return embed_by_bucket(feeds, self._buckets, self._run)

    def _run(self, bucket: int, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Embeddings:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        packed = {name: pack(rows.astype(np.int32)[:, None, :]) for name, rows in inputs.items()}
        reply = self._worker.call(do="run_many", signature=SIGNATURE.format(bucket), inputs=packed)
        values = unpack_reply(reply["outputs"]["sentence_embedding"])[:, 0]
        embeddings: Embeddings = (values.astype(np.float32) - self._zero_point) * np.float32(self._scale)
        return embeddings

    def milliseconds(self, feeds: AnyFeeds, runs: int, warmup: int) -> list[float]:
        """Time runs inside the child; a batch's texts run one after the other, and their times are added."""
        tokens = token_feeds(feeds)
        bucket = max(rows_by_bucket(tokens, self._buckets))
        totals = np.zeros(runs)
        for row in range(len(tokens.input_ids)):
            one = {
                "input_ids": pack(_fitted(tokens.input_ids[[row]], bucket)[0]),
                "attention_mask": pack(_fitted(tokens.attention_mask[[row]], bucket)[0]),
            }
            reply = self._worker.call(
                do="time", signature=SIGNATURE.format(bucket), inputs=one, runs=runs, warmup=warmup
            )
            totals += np.array(reply["milliseconds"])
        return [float(total) for total in totals]

    def peak_memory_bytes(self) -> int:
        """Give the child's peak resident memory."""
        return int(self._worker.call(do="memory")["peak_bytes"])


def _fitted(rows: NDArray[np.int64], width: int) -> NDArray[Any]:
    """Cut or zero-pad each row to int32[rows, 1, width]; the ids behind the mask do not matter."""
    return fitted(rows, width).astype(np.int32)[:, None, :]


class TfliteImageSession:
    """Run a .tflite file in a child process, one image at a time, as uint8[1, height, width, 3]."""

    def __init__(self, worker: Worker, params: tuple[float, int]) -> None:
        """Take a child process that has loaded the file.

        Args:
            worker: the child.
            params: scale and zero point of the vectors.
        """
        self._worker = worker
        self._scale, self._zero_point = params

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the embeddings of images, float32[batch, dim], dequantised.

        Raises:
            ConfigError: the feeds are texts.
        """
        inputs = {RAW_PIXELS: pack(raw_pixels(feeds)[:, None])}
        reply = self._worker.call(do="run_many", signature=IMAGE, inputs=inputs)
        values = unpack_reply(reply["outputs"]["sentence_embedding"])[:, 0]
        embeddings: Embeddings = (values.astype(np.float32) - self._zero_point) * np.float32(self._scale)
        return embeddings

    def milliseconds(self, feeds: AnyFeeds, runs: int, warmup: int) -> list[float]:
        """Time runs inside the child; a batch's images run one after the other, and their times are added."""
        totals = np.zeros(runs)
        for image in raw_pixels(feeds):
            inputs = {RAW_PIXELS: pack(image[None])}
            reply = self._worker.call(do="time", signature=IMAGE, inputs=inputs, runs=runs, warmup=warmup)
            totals += np.array(reply["milliseconds"])
        return [float(total) for total in totals]

    def peak_memory_bytes(self) -> int:
        """Give the child's peak resident memory."""
        return int(self._worker.call(do="memory")["peak_bytes"])


def raw_pixels(feeds: AnyFeeds) -> NDArray[np.uint8]:
    """Give the pixels of images, uint8[batch, height, width, 3].

    Raises:
        ConfigError: the feeds are texts, or numbers that no image has.
    """
    if not isinstance(feeds, PixelFeeds) or feeds.pixels is None:
        raise ConfigError("the model reads pixels from 0 to 255, and was given something else. Give it images.")
    return np.ascontiguousarray(feeds.pixels.transpose(0, 2, 3, 1))
