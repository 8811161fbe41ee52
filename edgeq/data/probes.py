"""Make the token batches on which a graph is compared before and after a rewrite."""

from __future__ import annotations

import numpy as np

from edgeq.data.tokens import Feeds


def probe_feeds(vocabulary: int, longest: int, seed: int = 0) -> tuple[Feeds, ...]:
    """Make token batches on which different graphs give different vectors: single, batched, padded right, and full.

    Args:
        vocabulary: token ids are drawn from 0..vocabulary-1.
        longest: the model's limit in tokens.
        seed: of the random token ids.
    """
    rng = np.random.default_rng(seed)
    feeds = []
    for lengths in ((3,), (7, 2, 12), (min(33, longest), 5), (min(longest, 64), min(longest, 64))):
        width = max(lengths)
        mask = (np.arange(width)[None, :] < np.array(lengths)[:, None]).astype(np.int64)
        feeds.append(Feeds(rng.integers(0, vocabulary, mask.shape).astype(np.int64) * mask, mask))
    return tuple(feeds)
