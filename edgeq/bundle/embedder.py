"""Embed texts with a bundle's artifact: tokenize, batch by length, run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from edgeq.data.sessions import Session, embed_batches
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import batches, token_limit
from edgeq.errors import ConfigError
from edgeq.records import Manifest

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)

# The prompts for queries and documents, in the order in which sentence-transformers looks for them.
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")


def require_batch_size(batch_size: object) -> None:
    """Refuse a batch size that is no positive integer.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"encode: batch_size is {batch_size!r}; an integer of at least 1 is needed.")


class Embedder:
    """Embed texts with a loaded artifact and its tokenizer; `edgeq.load` makes one."""

    def __init__(self, session: Session, tokenizer: Tokenizer, manifest: Manifest) -> None:
        """Take a session of the bundle's artifact, or of its FP32 model.

        Args:
            session: the loaded model.
            tokenizer: the bundle's.
            manifest: the bundle's.
        """
        self._session = session
        self._tokenizer = tokenizer
        self.manifest = manifest
        self.dim = manifest.source.dim
        self.max_sequence = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> NDArray[np.float32]:
        """Embed texts, batched by length.

        Args:
            texts: any number; longer ones than the model's limit are cut, with a warning.
            batch_size: the most texts run at once.
            prompt_name: names the prompt of the model to put before each text; None takes its default, if any.
            prompt: a string to put before each text instead; "" puts none.

        Returns:
            float32[texts, dim], in the order of the texts.

        Raises:
            ConfigError: `texts` is a single string, no ordered collection, or holds other objects than strings, the
                batch size is no positive integer, the model has no prompt of this name, or both prompts are given.
        """
        if prompt is None:
            prompt = self._prompt(prompt_name)
        elif prompt_name is not None:
            raise ConfigError(f"encode: prompt is {prompt!r} and prompt_name {prompt_name!r}; give one of them.")
        elif not isinstance(prompt, str):
            raise ConfigError(f"encode: prompt is of type {type(prompt).__name__}; a string is needed.")
        if isinstance(texts, str):
            raise ConfigError(f'encode: texts is the string {texts[:40]!r}; a list is needed. Write encode(["..."]).')
        if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping | Set):
            raise ConfigError(f"encode: texts is of type {type(texts).__name__}; a list of strings is needed.")
        prompted: list[str] = []
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise ConfigError(f"encode: texts[{position}] is of type {type(text).__name__}; a string is needed.")
            if not text.isascii() and (half := _LONE_SURROGATE.search(text)):
                raise ConfigError(f"encode: texts[{position}] holds {half[0]!r}, half a character (a lone surrogate).")
            prompted.append(prompt + text)
        require_batch_size(batch_size)
        if not prompted:
            return np.empty((0, self.dim), np.float32)
        tokens = self._tokenizer.encode(prompted)
        if tokens.truncated:
            _log.warning("%d of %d texts are cut at %d tokens", tokens.truncated, len(prompted), self.max_sequence)
        return embed_batches(self._session, batches(tokens, batch_size=batch_size), len(prompted))

    def encode_query(
        self, texts: Sequence[str], batch_size: int = 32, prompt_name: str | None = None, prompt: str | None = None
    ) -> NDArray[np.float32]:
        """Embed queries: the model's prompt "query" goes before each, if it has one.

        Arguments, result and errors are those of `encode`.
        """
        return self._encode_as(_QUERY, texts, batch_size, prompt_name, prompt)

    def encode_document(
        self, texts: Sequence[str], batch_size: int = 32, prompt_name: str | None = None, prompt: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents: the model's prompt "document", else "passage", else "corpus" goes before each, if any.

        Arguments, result and errors are those of `encode`.
        """
        return self._encode_as(_DOCUMENT, texts, batch_size, prompt_name, prompt)

    def _encode_as(
        self, names: Sequence[str], texts: Sequence[str], batch_size: int, prompt_name: str | None, prompt: str | None
    ) -> NDArray[np.float32]:
        """Embed texts with the first of these prompts that the model has, unless a prompt is given."""
        if prompt_name is None and prompt is None:
            prompt_name = next((name for name in names if name in self.manifest.source.prompts), None)
            prompt = "" if prompt_name is None else None  # without such a prompt the default is not used
        return self.encode(texts, batch_size, prompt_name, prompt)

    def _prompt(self, name: str | None) -> str:
        """Give the prompt of this name; for None the model's default prompt or ""."""
        prompts = self.manifest.source.prompts
        if name is None:
            default = self.manifest.source.default_prompt_name
            return prompts.get(default, "") if default is not None else ""
        if name not in prompts:
            raise ConfigError(f"encode: prompt_name is {name!r}; the model has {', '.join(prompts) or 'no prompts'}.")
        return prompts[name]
