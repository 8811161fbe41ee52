"""Hold the tokens of texts, and batch them by length or by bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.data.batches import PIXELS, AnyFeeds, Batch, Samples
from edgeq.errors import ConfigError
from edgeq.records import TextSet

_SWEEP_TOKENS, _SWEEP_LENGTH = 8192, 30


@dataclass(frozen=True)
class Feeds:
    """Hold one padded batch of tokens.

    Attributes:
        input_ids: int64[batch, sequence].
        attention_mask: int64[batch, sequence], 1 for tokens and 0 for padding.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]

    @property
    def size(self) -> int:
        """Count the tokens, padding included."""
        return int(self.input_ids.size)

    def named(self, inputs: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Map the names of graph inputs to arrays; `token_type_ids` is all zero, as for single texts.

        Raises:
            ConfigError: the graph has an input of images.
        """
        if PIXELS in inputs:
            raise ConfigError(f"the model reads {', '.join(inputs)}, and was given texts. Give it images.")
        known = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": np.zeros_like(self.input_ids),
        }
        return {name: known[name] for name in inputs}


def token_feeds(feeds: AnyFeeds) -> Feeds:
    """Return feeds as tokens, for code that needs tokens.

    Raises:
        ConfigError: the feeds are images.
    """
    if not isinstance(feeds, Feeds):
        raise ConfigError("this artifact takes the tokens of texts, and was given something else. Give it texts.")
    return feeds


@dataclass(frozen=True)
class Tokens:
    """Hold the token ids of texts, special tokens included.

    Attributes:
        ids: one tuple for each text, not longer than the model's limit.
        truncated: the number of texts that were cut at the limit.
        pad_id: the id of padding.
    """

    ids: tuple[tuple[int, ...], ...]
    truncated: int
    pad_id: int

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Give the length of the longest text."""
        return max(len(ids) for ids in self.ids)

    def chosen(self, rows: Sequence[int]) -> Tokens:
        """Give the texts at these positions."""
        return Tokens(tuple(self.ids[row] for row in rows), 0, self.pad_id)

    def swept(self, vocabulary: int, seed: int) -> Tokens:
        """Make texts of random tokens, none of the vocabulary twice, between the special tokens of the real texts."""
        length = max(1, min(_SWEEP_LENGTH, vocabulary, self.longest - 2))
        count = min(_SWEEP_TOKENS, vocabulary) // length
        rng = np.random.default_rng(seed)
        drawn = rng.permutation(vocabulary)[: count * length].reshape(count, length).tolist()
        first, last = ({ids[end] for ids in self.ids if ids} for end in (0, -1))
        before, after = (tuple(ends) if len(ends) == 1 else () for ends in (first, last))
        return Tokens(tuple((*before, *row, *after) for row in drawn), 0, self.pad_id)

    def batches(self, batch_size: int, most: int) -> list[Batch]:
        """Batch texts of similar length, for little padding; a text of more than `most` tokens is a batch alone."""
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        made: list[Batch] = []
        rows: list[int] = []
        for row in order:
            width = len(self.ids[row])
            if rows and (len(rows) == batch_size or (len(rows) + 1) * width > most):
                made.append(_batch(self, rows))
                rows = []
            rows.append(row)
        return [*made, _batch(self, rows)] if rows else made

    def unpadded(self, most: int) -> list[Batch]:
        """Batch texts of exactly the same length; a text without a token counts as one token of padding."""
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(self.ids):
            by_length.setdefault(max(1, len(ids)), []).append(row)
        made = []
        for length in sorted(by_length, reverse=True):
            rows, width = by_length[length], max(1, most // length)
            for start in range(0, len(rows), width):
                chosen = tuple(rows[start : start + width])
                block = np.array([self.ids[row] or (self.pad_id,) for row in chosen], np.int64)
                made.append(Batch(chosen, Feeds(block, np.ones_like(block))))
        return made


def text_tokens(samples: Samples) -> Tokens:
    """Return samples as tokens, for code that needs texts.

    Raises:
        ConfigError: the samples are images.
    """
    if not isinstance(samples, Tokens):
        raise ConfigError("this takes texts, and was given images. Choose a model that embeds texts.")
    return samples


def bucket_lengths(buckets_tokens: Sequence[int], max_sequence: int) -> tuple[int, ...]:
    """Give the sequence lengths of a static artifact, cut at the model's limit; empty for dynamic shapes."""
    return tuple(sorted({min(bucket, max_sequence) for bucket in buckets_tokens}))


def token_limit(buckets_tokens: Sequence[int], max_sequence: int) -> int:
    """Give the most tokens of a text on a target: the model's limit, or the largest bucket where that is smaller."""
    return max(bucket_lengths(buckets_tokens, max_sequence), default=max_sequence)


def rows_by_bucket(feeds: Feeds, buckets: Sequence[int]) -> dict[int, list[int]]:
    """Assign each text to the smallest bucket that holds it: bucket -> rows of the feeds.

    A single text counts with its padding; each of several counts its own tokens only.

    Args:
        feeds: of any texts.
        buckets: sequence lengths, ascending.

    Raises:
        ConfigError: a text is longer than the largest bucket.
    """
    sizes = feeds.attention_mask.sum(axis=1).tolist()
    if len(sizes) == 1:
        sizes = [feeds.input_ids.shape[1]]
    longest = max(sizes)
    if longest > buckets[-1]:
        raise ConfigError(f"a text has {longest} tokens; the largest bucket holds {buckets[-1]}. Cut it first.")
    rows: dict[int, list[int]] = {}
    for row, size in enumerate(sizes):
        rows.setdefault(next(bucket for bucket in buckets if bucket >= size), []).append(row)
    return rows


def fitted(rows: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Cut or pad each row with zeros to int64[rows, width]; ids under a zero of the mask have no influence."""
    kept = rows[:, :width]
    return np.pad(kept, ((0, 0), (0, width - kept.shape[1])))


def batches(samples: Samples, batch_size: int = 32, max_tokens: int = 4096) -> list[Batch]:
    """Batch samples of similar size, so that there is little padding.

    Args:
        samples: tokens of texts, or images.
        batch_size: the most samples in a batch.
        max_tokens: the most tokens in a batch, padding included; a longer text is a batch alone.
    """
    return samples.batches(batch_size, max_tokens)


def _batch(tokens: Tokens, rows: Sequence[int]) -> Batch:
    width = max(1, *(len(tokens.ids[row]) for row in rows))  # a text may have no token, a batch must have a column
    ids = np.full((len(rows), width), tokens.pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for line, row in enumerate(rows):
        length = len(tokens.ids[row])
        ids[line, :length] = tokens.ids[row]
        mask[line, :length] = 1
    return Batch(tuple(rows), Feeds(ids, mask))


def sha256_texts(texts: Sequence[str]) -> str:
    """Hash texts in their order with SHA-256, to identify the set."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode() + text.encode())
    return digest.hexdigest()


def text_set(origin: str, texts: Sequence[str], tokens: Tokens) -> TextSet:
    """Describe a set of texts by its hash and its numbers of texts and tokens."""
    return TextSet(
        origin=origin,
        sha256=sha256_texts(texts),
        count=len(texts),
        tokens=sum(len(ids) for ids in tokens.ids),
        truncated=tokens.truncated,
    )
