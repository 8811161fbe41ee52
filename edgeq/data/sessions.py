"""Run batches through a loaded model, and each text in the smallest bucket that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.data.batches import AnyFeeds, Batch
from edgeq.data.tokens import fitted, rows_by_bucket, token_feeds
from edgeq.errors import ConfigError

Embeddings = NDArray[np.float32]


class Session(Protocol):
    """Keep a loaded artifact, because loading costs seconds and running milliseconds."""

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Embed one batch, float32[batch, dim]."""
        ...


def embed_batches(session: Session, batches: Iterable[Batch], count: int) -> Embeddings:
    """Run every batch, and order the vectors as the samples were.

    Args:
        session: the loaded artifact.
        batches: of samples; the `rows` of all batches together are 0..count-1.
        count: of the samples.

    Returns:
        float32[count, dim], in the order of the samples.

    Raises:
        ConfigError: there are no batches.
    """
    embeddings: Embeddings | None = None
    for batch in batches:
        vectors = session(batch.feeds)
        if embeddings is None:
            embeddings = np.empty((count, vectors.shape[1]), np.float32)
        embeddings[list(batch.rows)] = vectors
    if embeddings is None:
        raise ConfigError("no texts to embed: give at least one")
    return embeddings


def embed_by_bucket(
    feeds: AnyFeeds, buckets: Sequence[int], run: Callable[[int, NDArray[np.int64], NDArray[np.int64]], Embeddings]
) -> Embeddings:
    """Run each text in the smallest bucket that holds it.

    A single text counts with its padding; each of several counts its own tokens only.

    Args:
        feeds: the texts.
        buckets: lengths in tokens, in ascending order.
        run: takes a bucket, ids and mask, each int64[texts, bucket], and gives their vectors, float32[texts, dim].

    Raises:
        ConfigError: there are no texts, the feeds are images, or a text is longer than the largest bucket.
    """
    embeddings: Embeddings | None = None
    tokens = token_feeds(feeds)
    for bucket, members in rows_by_bucket(tokens, buckets).items():
        ids, mask = (fitted(rows[members], bucket) for rows in (tokens.input_ids, tokens.attention_mask))
        vectors = run(bucket, ids, mask)
        if embeddings is None:
            embeddings = np.empty((len(tokens.input_ids), vectors.shape[1]), np.float32)
        embeddings[members] = vectors
    if embeddings is None:
        raise ConfigError("no texts to embed: give at least one")
    return embeddings


def unit(rows: Embeddings) -> NDArray[np.float64]:
    """L2-normalise each row, float64[rows, dim]; a zero row stays zero."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = wide / np.where(norms == 0.0, 1.0, norms)
    return scaled
