"""Turn texts into tokens as each of sentence-transformers' methods does: with its prompt, cut at its own length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Literal, get_args

from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import Tokens
from edgeq.errors import ConfigError
from edgeq.records import Source

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
Method = Literal["encode", "encode_query", "encode_document"]
METHODS: tuple[Method, ...] = get_args(Method)
# The prompts that each method looks for, in the order in which sentence-transformers does.
_PROMPTS: dict[Method, tuple[str, ...]] = {
    "encode": (), "encode_query": ("query",), "encode_document": ("document", "passage", "corpus"),
}  # fmt: skip


class TextInput:
    """Give the token ids that a model reads for a text."""

    def __init__(self, tokenizer: Tokenizer, source: Source) -> None:
        """Take a model's tokenizer, which cuts at the most tokens that its graph takes, and its source record."""
        self._source = source
        self._tokenizers: dict[Method, Tokenizer] = dict.fromkeys(METHODS, tokenizer)
        lengths: dict[Method, int | None] = {
            "encode_query": source.query_length, "encode_document": source.document_length,
        }  # fmt: skip
        for method, length in lengths.items():
            if length is not None and length < tokenizer.max_sequence:
                self._tokenizers[method] = tokenizer.cut_at(length)

    def length(self, method: Method = "encode") -> int:
        """Give the most tokens of a text."""
        return self._tokenizers[method].max_sequence

    def tokens(
        self,
        texts: Sequence[str],
        method: Method = "encode",
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Tokens:
        """Put a prompt before each text, and turn it into token ids.

        Args:
            texts: any number.
            method: which of sentence-transformers' methods decides the prompt, where none is given, and the length.
            prompt_name: names a prompt of the model; None takes the method's own, or the model's default for `encode`.
            prompt: a string to put before each text instead; "" puts none.

        Raises:
            ConfigError: `texts` is a single string, no ordered collection, or holds other objects than strings, the
                model has no prompt of this name, both prompts are given, or the tokenizer fails.
        """
        if prompt is None:
            prompt = self._prompt(method, prompt_name)
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
        return self._tokenizers[method].encode(prompted)

    def _prompt(self, method: Method, name: str | None) -> str:
        """Give the prompt of this name; for None the method's own, and for `encode` the model's default, or ""."""
        prompts = self._source.prompts
        if name is None:
            if method == "encode":
                default = self._source.default_prompt_name
                return prompts.get(default, "") if default is not None else ""
            name = next((name for name in _PROMPTS[method] if name in prompts), None)
            return "" if name is None else prompts[name]  # without such a prompt the default is not used
        if name not in prompts:
            raise ConfigError(f"encode: prompt_name is {name!r}; the model has {', '.join(prompts) or 'no prompts'}.")
        return prompts[name]
