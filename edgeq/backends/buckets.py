"""Choose a bucket for each text, and fit its tokens into it: what runtimes with static shapes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.contract import Embeddings
from edgeq.errors import ConfigError
from edgeq.texts import Feeds

RunBucket = Callable[[int, NDArray[np.int64], NDArray[np.int64]], Embeddings]


def embed_by_bucket(feeds: Feeds, buckets: Sequence[int], run: RunBucket) -> Embeddings:
    """Run each text in its bucket and put its vector back in its place.

    Args:
        feeds: the batch.
        buckets: lengths in tokens, ascending.
        run: called with a bucket, and with ids and mask of the texts that go into it; gives float32[texts, dim].

    Raises:
        ConfigError: there are no texts, or one is longer than the largest bucket.
    """
    rows: dict[int, list[int]] = {}
    for row, bucket in enumerate(buckets_of(feeds, buckets)):
        rows.setdefault(bucket, []).append(row)
    embeddings: Embeddings | None = None
    for bucket, members in rows.items():
        vectors = run(bucket, feeds.input_ids[members], feeds.attention_mask[members])
        if embeddings is None:
            embeddings = np.empty((len(feeds.input_ids), vectors.shape[1]), np.float32)
        embeddings[members] = vectors
    if embeddings is None:
        raise ConfigError("no texts to embed: give at least one")
    return embeddings


def buckets_of(feeds: Feeds, buckets: Sequence[int]) -> list[int]:
    """Give the smallest bucket that holds each text.

    A text alone runs at the length it is given in; among others it is cut back to its own tokens first.

    Args:
        feeds: the batch.
        buckets: lengths in tokens, ascending.

    Raises:
        ConfigError: a text is longer than the largest bucket.
    """
    sizes = feeds.attention_mask.sum(axis=1).tolist()
    if len(sizes) == 1:
        sizes = [feeds.input_ids.shape[1]]
    longest = max(sizes, default=0)
    if longest > buckets[-1]:
        raise ConfigError(f"a text has {longest} tokens; the largest bucket holds {buckets[-1]}. Cut it first.")
    return [next(bucket for bucket in buckets if bucket >= size) for size in sizes]


def fitted(rows: NDArray[np.int64], width: int, dtype: type[np.integer[Any]]) -> NDArray[Any]:
    """Cut or pad each row with zeros to the width: [rows, 1, width]. A masked id may be any."""
    kept = rows[:, :width]
    return np.pad(kept, ((0, 0), (0, width - kept.shape[1]))).astype(dtype)[:, None, :]
