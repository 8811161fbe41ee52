"""Embed texts with a bundle's artifact: tokenize, batch by length, run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.codec import Codec
from edgeq.codecs.find import find_codec
from edgeq.data.sessions import Session, embed_batches
from edgeq.data.text_input import Method, TextInput
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import Tokens, batches, token_limit
from edgeq.errors import ConfigError
from edgeq.records import Manifest

_log = logging.getLogger(__name__)


def require_batch_size(batch_size: object) -> None:
    """Refuse a batch size that is no positive integer.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"encode: batch_size is {batch_size!r}; an integer of at least 1 is needed.")


class Embedder:
    """Embed texts with a loaded artifact and its tokenizer; `edgeq.load` makes one."""

    def __init__(self, session: Session, tokenizer: Tokenizer, manifest: Manifest, codecs: Path | None = None) -> None:
        """Take a session of the bundle's artifact, or of its FP32 model.

        Args:
            session: the loaded model.
            tokenizer: the bundle's.
            manifest: the bundle's.
            codecs: the file of the bundle with the statistics that codes need.
        """
        self._codecs = codecs
        self._session = session
        self.inputs = TextInput(tokenizer, manifest.source)
        self.manifest = manifest
        self.dim = manifest.source.dim
        self.max_sequence = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        prompt_name: str | None = None,
        prompt: str | None = None,
        codec: str | Path | None = None,
    ) -> NDArray[Any]:
        """Embed texts, batched by length.

        Args:
            texts: any number; longer ones than the model's limit are cut, with a warning.
            batch_size: the most texts run at once.
            prompt_name: names the prompt of the model to put before each text; None takes its default, if any.
            prompt: a string to put before each text instead; "" puts none.
            codec: give codes instead of floats: a codec's name, such as "int8" or "binary", or the path of its file.

        Returns:
            float32[texts, dim], in the order of the texts; with a codec int8[texts, dim], uint8[texts, bytes] or what
            else it gives.

        Raises:
            ConfigError: `texts` is a single string, no ordered collection, or holds other objects than strings, the
                batch size is no positive integer, the model has no prompt of this name, or both prompts are given.
        """
        tokens = self.inputs.tokens(texts, "encode", prompt_name, prompt)
        return self._coded(lambda: self._embed(tokens, "encode", batch_size), codec)

    def encode_query(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        prompt_name: str | None = None,
        prompt: str | None = None,
        codec: str | Path | None = None,
    ) -> NDArray[Any]:
        """Embed queries: the model's prompt "query" goes before each, if it has one, and its length for queries cuts.

        Arguments, result and errors are those of `encode`.
        """
        tokens = self.inputs.tokens(texts, "encode_query", prompt_name, prompt)
        return self._coded(lambda: self._embed(tokens, "encode_query", batch_size), codec)

    def encode_document(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        prompt_name: str | None = None,
        prompt: str | None = None,
        codec: str | Path | None = None,
    ) -> NDArray[Any]:
        """Embed documents: the model's prompt "document", else "passage", else "corpus" goes before each, if any.

        The model's length for documents cuts, where it states one.

        Arguments, result and errors are those of `encode`.
        """
        tokens = self.inputs.tokens(texts, "encode_document", prompt_name, prompt)
        return self._coded(lambda: self._embed(tokens, "encode_document", batch_size), codec)

    def codec(self, name: str | Path) -> Codec:
        """Give a codec for this model's vectors: by its name, or by the path of its file.

        Raises:
            ConfigError: there is no such codec, it must be trained, or the bundle has no statistics of its vectors.
            BundleCorrupt: the file is damaged or of another version.
        """
        return find_codec(name, self._codecs, self.dim)

    def _coded(self, embed: Callable[[], NDArray[np.float32]], codec: str | Path | None) -> NDArray[Any]:
        """Embed, and encode the vectors where a codec is named; a codec that is not there is told first."""
        if codec is None:
            return embed()
        found = self.codec(codec)
        return found.encode(embed())

    def _embed(self, tokens: Tokens, method: Method, batch_size: int) -> NDArray[np.float32]:
        """Run tokens through the artifact, and warn of texts that were cut."""
        require_batch_size(batch_size)
        if not len(tokens):
            return np.empty((0, self.dim), np.float32)
        if tokens.truncated:
            length = self.inputs.length(method)
            _log.warning("%d of %d texts are cut at %d tokens", tokens.truncated, len(tokens), length)
        return embed_batches(self._session, batches(tokens, batch_size=batch_size), len(tokens))
