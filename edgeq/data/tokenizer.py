"""Turn texts into token ids with a model's own tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import tokenizers

from edgeq.data.tokens import Tokens
from edgeq.errors import ConfigError
from edgeq.system.untrusted import oversize, parse_json

_MOST_BYTES = 1 << 30
_LONGEST = 1 << 20  # tokens


class Tokenizer:
    """Turn texts into token ids."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, max_sequence: int, padded_to: int = 0, pad_token: str | None = None
    ) -> None:
        """Cut texts at `max_sequence` tokens, and pad them with `pad_token` up to `padded_to` tokens."""
        self._tokenizer = tokenizer
        self.max_sequence = max_sequence
        self._padded_to = padded_to
        padding = tokenizer.padding or {}
        stated = tokenizer.token_to_id(pad_token) if padded_to and pad_token else None
        self.pad_id = int(padding.get("pad_id", _pad_id(tokenizer)) if stated is None else stated)
        tokenizer.no_padding()
        # The tokenizer's own file decides at which side a text is cut, but not at which length.
        tokenizer.enable_truncation(max_sequence, direction=(tokenizer.truncation or {}).get("direction", "right"))
        self.vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, path: Path, max_sequence: int) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            ConfigError: the file is missing or no tokenizer, or `max_sequence` is less than the model pads texts to.
        """
        if (path.parent / "preprocessor_config.json").is_file() and not path.is_file():
            raise ConfigError(f"{path.parent}: is of a model that takes images, and this takes texts; choose another")
        if not path.is_file():
            raise ConfigError(f"{path}: not there; a fast tokenizer's tokenizer.json is needed")
        reason = oversize(path, _MOST_BYTES)
        if reason is not None:
            raise ConfigError(f"{path}: {reason}; a fast tokenizer's tokenizer.json is needed")
        padded_to, pad_token = _padding_as_text(path.with_name("tokenizer_config.json"))
        if max_sequence < padded_to:
            raise ConfigError(
                f"{path.parent}: the model reads texts padded to {padded_to} tokens, and {max_sequence} are asked for. "
                f"Choose a target that takes {padded_to}."
            )
        with _tokenizer_errors(str(path)):
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            return cls(tokenizer, max_sequence, padded_to, pad_token)

    def cut_at(self, max_sequence: int) -> Tokenizer:
        """Give a tokenizer that differs in the length alone at which it cuts texts."""
        other = copy(self)
        other._tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        other.max_sequence = max_sequence
        direction = (self._tokenizer.truncation or {}).get("direction", "right")
        other._tokenizer.enable_truncation(max_sequence, direction=direction)
        return other

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into token ids, and count the texts that were cut.

        Raises:
            ConfigError: the tokenizer fails: its file is damaged, or was made to do harm.
        """
        with _tokenizer_errors("tokenizer.json"):
            encoded = self._tokenizer.encode_batch(list(texts))
        filler = (self.pad_id,) * self._padded_to
        ids = tuple((*item.ids, *filler[len(item.ids) :]) for item in encoded)
        return Tokens(ids, sum(1 for item in encoded if item.overflowing), self.pad_id)


def _padding_as_text(path: Path) -> tuple[int, str | None]:
    """Read to how many tokens the model pads texts without a mask, and with which token; 0 where it does not."""
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise ConfigError(f"{path}: {reason}; restore it from the model's origin")
    try:
        config = parse_json(path.read_bytes()) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); restore it from the model's origin") from error
    if not isinstance(config, dict) or config.get("padding") != "max_length":
        return 0, None
    inputs = config.get("model_input_names")
    if not isinstance(inputs, list) or "attention_mask" in inputs:
        return 0, None
    token, length = config.get("pad_token"), config.get("max_length")
    name = token.get("content") if isinstance(token, dict) else token
    if type(length) is not int or not 0 < length <= _LONGEST or not isinstance(name, str | None):
        raise ConfigError(f"{path}: pads texts to {length!r} with {name!r}; restore it from the model's origin")
    return length, name


@contextmanager
def _tokenizer_errors(where: str) -> Iterator[None]:
    """Turn errors of the tokenizers library, bare Exception and panics (BaseException), into ConfigError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, ConfigError):
        raise
    except BaseException as error:
        raise ConfigError(f"{where}: no tokenizer that works ({error}); restore it from the model's origin") from error


def _pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    for token in ("[PAD]", "<pad>", "<|endoftext|>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    return 0
