"""Make the token batches on which a graph is compared before and after a rewrite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeq.data.tokens import Feeds

_MOST_TOKENS = 24


def probe_feeds(vocabulary: int, longest: int, seed: int = 0) -> tuple[Feeds, ...]:
    """Make token batches that tell graphs apart: single, batched, padded right, and full.

    Args:
        vocabulary: token ids are drawn from 0..vocabulary-1.
        longest: the model's limit in tokens.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    feeds = []
    for lengths in ((3,), (7, 2, 12), (min(33, longest), 5), (min(longest, 64), min(longest, 64))):
        width = max(lengths)
        mask = (np.arange(width)[None, :] < np.array(lengths)[:, None]).astype(np.int64)
        feeds.append(Feeds(rng.integers(0, vocabulary, mask.shape).astype(np.int64) * mask, mask))
    return tuple(feeds)


def text_probes(ids: Sequence[Sequence[int]]) -> tuple[Feeds, ...]:
    """Make token batches of real texts, for rewrites that count on what tokenizers write: one alone, and four padded.

    A model may count positions up to the padding token, which drawn ids could hold in the middle of a text.

    Args:
        ids: token ids of each text, special tokens included.

    Returns:
        Batches of at most 24 tokens a text, if there are such texts; none without texts.
    """
    by_length = sorted(filter(None, ids), key=len)
    chosen = [text for text in by_length if len(text) <= _MOST_TOKENS] or by_length[:1]
    places = np.unique(np.linspace(0, len(chosen) - 1, min(4, len(chosen))).round().astype(int)) if chosen else ()
    texts = [chosen[place] for place in places]
    return tuple(_padded(batch) for batch in (texts[-1:], texts) if batch)


def _padded(texts: Sequence[Sequence[int]]) -> Feeds:
    width = max(map(len, texts))
    rows = np.array([[*text, *[0] * (width - len(text))] for text in texts], np.int64)
    mask = np.array([[1] * len(text) + [0] * (width - len(text)) for text in texts], np.int64)
    return Feeds(rows, mask)
