"""Compare token ids with those of the source's own path, on a fixed list of short, long and odd texts.

The source's own path runs once, while the model is converted. Its ids lie beside the tokenizer from then on, in the
cache and in every bundle, so that any copy of the tokenizer can be compared with them, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from edgeq.data.text_input import Method, TextInput
from edgeq.data.tokenizer import Tokenizer
from edgeq.errors import ConfigError, ParityFailed
from edgeq.records import EndToEnd, Record, Source
from edgeq.system.untrusted import oversize

FILE = "end_to_end.json"
ERROR_MAX = 1e-3  # of a vector's length: docs/decisions/export.md has the figures
_MOST_BYTES = 32 << 20
_SHOWN_FAILURES, _SHOWN_CHARS = 3, 40
_WORDS = "the bank of the river runs past house number".split()

_TEXTS = (
    "A dog runs through the park.",
    "a",
    "How do I change the oil of a 2004 Toyota Corolla?",
    "UPPER lower MiXeD and CamelCase",
    "Prices rose by 3.5 % to $1,299.99 (see table 4b, p. 17).",
    "def f(x):\n\treturn x ** 2  # two  spaces\n",
    "https://example.org/a?b=c&d=%20#e or me@example.org",
    "",
    " ",
    " \t\r\n ",
    "  leading and trailing  ",
    "non\u00a0breaking, zero\u200bwidth, soft\u00adhyphen, \ufefffirst",
    "na\u00efve caf\u00e9 \u00fcber Stra\u00dfe \u0152uvre",
    "nai\u0308ve cafe\u0301 u\u0308ber",
    "\u0130stanbul, I\u0131 and \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
    "\ufb01ne \u2460 \uff21\uff22\uff23 \u33a1 \u00bd",
    "\u6211\u4eec\u53bb\u516c\u56ed\u8dd1\u6b65\u3002",
    "\u6771\u4eac\u30bf\u30ef\u30fc\u306f\u9ad8\u3044 \uff76\uff9e",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u200fabc\u200e \u202eright to left\u202c",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 and \U0001f3f3\ufe0f\u200d\U0001f308",
    "control \x00\x07\x1b\x7f\x85 characters",
    "\ufffd \U0010ffff \ue000",
    "a [MASK] and a [SEP] and [CLS] [PAD] [UNK]",
    "a <mask> and a </s> and <s> <pad> <unk> <|endoftext|>",
    "##ing \u2581word \u0120word @@",
    "e" * 120,
    "!?.,;:-_+*/\\'\"`~^|<>{}[]()",
)


class OwnPath(Record):
    """Hold the token ids that the source's own path gives, and how far FP32's vectors are from its own.

    Of a source that cannot be compared it holds the reason alone.
    """

    against: str | None  # what was run, with its version
    reason: str | None = None  # why it was not, or why some texts are left out
    texts: tuple[str, ...] = ()
    has_prompts: bool = False  # whether the ids are of all three methods with their prompts, or of bare texts
    ids: dict[Method, tuple[tuple[int, ...] | None, ...]] = {}  # special tokens included; None: the same as of encode
    vectors: int = 0
    cosine_min: float | None = None
    error_max: float | None = None
    farthest: str | None = None  # the method and text of the largest distance

    def expected(self, method: Method, row: int) -> tuple[int, ...]:
        """Give the ids of a text by a method."""
        found = self.ids[method][row]
        return found if found is not None else self.ids["encode"][row] or ()


def texts(limit: int | None) -> tuple[str, ...]:
    """Give the texts to compare, short and odd ones, and longer ones than `limit` tokens where there is a limit."""
    if limit is None:
        return (*_TEXTS, _words(40), _words(150))
    far = " ".join(f"\u516c\u56ed{row}, \u00dcber-{row} \U0001f44d" for row in range(limit // 4 + 8))
    return (*_TEXTS, _words(limit - 2), _words(limit + 8), f"  {_words(2 * limit)}\n", far)


def without(reason: str) -> OwnPath:
    """Give what is stored for a source that cannot be compared."""
    return OwnPath(against=None, reason=reason)


def compressed(ids: Mapping[Method, list[tuple[int, ...]]]) -> dict[Method, tuple[tuple[int, ...] | None, ...]]:
    """Leave out ids that are the same as those of `encode`."""
    plain = ids["encode"]
    return {
        method: tuple(None if method != "encode" and row == own else row for row, own in zip(rows, plain, strict=True))
        for method, rows in ids.items()
    }


def read(folder: Path) -> OwnPath:
    """Read the ids of the source's own path beside a tokenizer.

    Raises:
        ConfigError: the file is no such file.
    """
    path = folder / FILE
    if not path.is_file():
        return without("the bundle was made by an edgeq that did not compare")
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise ConfigError(f"{path}: {reason}. Fetch or export the bundle again.")
    try:
        return OwnPath.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path}: {error.errors()[0]['msg']}. Fetch or export the bundle again.") from error


def write(own: OwnPath, folder: Path) -> None:
    """Write the ids of the source's own path beside a tokenizer."""
    (folder / FILE).write_text(own.model_dump_json() + "\n", encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Distance:
    """Hold how far FP32's vector of a text is from the source's own.

    Attributes:
        method: that made both.
        row: position of the text.
        cosine: of the two.
        error: length of their difference, relative to the source's vector.
    """

    method: Method
    row: int
    cosine: float
    error: float


def distance(method: Method, row: int, found: NDArray[np.float32], expected: NDArray[np.float32]) -> Distance:
    """Measure two vectors, float32[dim] each; two zero vectors, of a text without a token, are the same."""
    mine, own = found.astype(np.float64), expected.astype(np.float64)
    lengths = float(np.linalg.norm(mine)), float(np.linalg.norm(own))
    error = float(np.linalg.norm(mine - own))
    if lengths == (0.0, 0.0):
        return Distance(method, row, 1.0, 0.0)
    if not min(lengths) > 0.0 or not np.isfinite(error):
        return Distance(method, row, 0.0, 1.0)
    return Distance(method, row, min(1.0, float(mine @ own) / (lengths[0] * lengths[1])), error / lengths[1])


def with_distances(own: OwnPath, distances: Sequence[Distance]) -> OwnPath:
    """Note the figures of FP32's vectors."""
    worst = max(distances, key=lambda item: item.error)
    figures = {  # rounded: the last digits are float noise, and equal inputs give equal bytes
        "vectors": len(distances),
        "cosine_min": round(min(item.cosine for item in distances), 7),
        "error_max": float(f"{worst.error:.1e}"),
        "farthest": f"{worst.method}({_shown(own.texts[worst.row])})",
    }
    return own.model_copy(update=figures)


def compare(folder: Path, source: Source, limit: int) -> EndToEnd:
    """Compare the ids of the tokenizer in a folder with those of the source's own path.

    Args:
        folder: of a bundle, or of the configuration that becomes one.
        source: the record.
        limit: the most tokens that the artifact takes. Where that is less than the source takes, longer texts are cut
            elsewhere than the source cuts them, and are left out.

    Raises:
        ConfigError: a file in the folder is damaged.
    """
    own = read(folder)
    if own.against is None:
        return EndToEnd(status="not compared", reason=own.reason)
    inputs = TextInput(Tokenizer.from_file(folder / "tokenizer.json", limit), source)
    failures: list[str] = []
    compared: set[int] = set()
    for method in own.ids:
        found = inputs.tokens(own.texts, method, prompt=None if own.has_prompts else "").ids
        for row, ids in enumerate(found):
            expected = own.expected(method, row)
            if limit < source.max_sequence and len(expected) > limit:
                continue
            compared.add(row)
            if ids != expected:
                failures.append(_difference(own, method, row, ids, expected))
    if len(failures) > _SHOWN_FAILURES:
        failures = [*failures[:_SHOWN_FAILURES], f"{len(failures) - _SHOWN_FAILURES} more differ."]
    if own.error_max is not None and not own.error_max <= ERROR_MAX:
        failures.append(
            f"{own.farthest}: FP32's vector is {own.error_max:.1e} of its length away from {own.against}'s own (cosine "
            f"{own.cosine_min:.6f}); at most {ERROR_MAX:g} is allowed."
        )
    return EndToEnd(
        status="failed" if failures else "passed" if compared else "not compared",
        against=own.against,
        compared=len(compared),
        vectors=own.vectors,
        cosine_min=own.cosine_min,
        error_max=own.error_max,
        reason=own.reason,
        failures=tuple(failures),
    )


def _difference(own: OwnPath, method: str, row: int, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Say where two lists of ids differ first."""
    at = next(
        (place for place, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(expected)),
    )
    here, there = (str(ids[at]) if at < len(ids) else "no id" for ids in (found, expected))
    return (
        f"{method}({_shown(own.texts[row])}): tokenizer.json gives {len(found)} token ids and {own.against} "
        f"{len(expected)}; from position {at} on they differ, {here} and {there}."
    )


def require_same(found: EndToEnd, name: str) -> None:
    """Refuse tokens or vectors that differ from the source's own.

    Raises:
        ParityFailed: they do.
    """
    if found.status == "failed":
        raise ParityFailed(
            f"{name}: texts come out otherwise than from the model itself: {' '.join(found.failures)} "
            "Make the tokenizer.json and the settings beside it agree; if they do, report the model."
        )


def _shown(text: str) -> str:
    """Give the beginning of a text, in quotes."""
    return repr(text[:_SHOWN_CHARS]) + ("..." if len(text) > _SHOWN_CHARS else "")


def _words(count: int) -> str:
    """Give a text of this many words and numbers."""
    return " ".join(_WORDS[row % len(_WORDS)] if row % 10 else str(row) for row in range(max(1, count)))
