"""Choose the texts of a parity card, with FP32's recorded vectors where the float model is not found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.bundle.golden import read_golden
from edgeq.data.plans import DEFAULT, filled_up
from edgeq.data.sessions import Embeddings
from edgeq.data.splits import deduplicate, sha256_text, split
from edgeq.data.text_files import default_texts, read_texts
from edgeq.data.tokens import sha256_texts
from edgeq.errors import ConfigError
from edgeq.pipeline.growing_validation import sizes
from edgeq.reports.bundles import Found


@dataclass(frozen=True)
class Chosen:
    """Hold the texts, their origin, a note for the card, and FP32's recorded vectors, if any.

    `recorded` is float32[texts, dim].
    """

    texts: tuple[str, ...]
    origin: str
    note: str | None
    recorded: Embeddings | None = None


def golden(found: Sequence[Found]) -> Chosen:
    """Choose the golden texts of the bundle with the lowest token limit, with the FP32 vectors recorded there.

    The card cuts all texts at this limit; only there FP32 was given texts cut alike.
    """
    shortest = min(found, key=lambda item: item.token_limit)
    data = read_golden(shortest.path)
    note = (
        f"The FP32 model is not in the cache: compared on the {len(data.texts)} golden texts of {shortest.name} with "
        "the FP32 vectors recorded there. --against FILE names the model."
    )
    return Chosen(tuple(data.texts), f"golden texts of {shortest.name}", note, data.reference)


def choose(found: Sequence[Found], texts: Path | None, column: str | None) -> Chosen:
    """Read the user's texts, or the default validation texts.

    Of a file that the export calibrated on, the fifth that the export validated on is chosen.

    Raises:
        ConfigError: the texts cannot be read.
    """
    given = deduplicate(read_texts(texts or default_texts()[1], column if texts else None))
    origin = texts.name if texts else DEFAULT
    wanted = {item.report.texts.sha256 for item in found}
    digest = sha256_texts(given)
    parts = [given[:size] for size in sizes(len(given), origin, None)]  # of the default set as few as an export took
    for part, name in (*((part, origin) for part in parts), filled_up(given, origin)):
        if wanted == {sha256_texts(part)}:
            return Chosen(tuple(part), name, None)
    given = given if texts else parts[0]
    fifth = split(given, sha256_text)[1]
    if wanted <= {sha256_texts(fifth), sha256_texts(filled_up(fifth, origin, given)[0])}:
        note = f"{origin}: the export calibrated on four fifths of it; the fifth that validated there is compared."
        return Chosen(tuple(fifth), f"{origin} (a fifth, by hash)", note)
    if digest in {item.manifest.calibration.texts.sha256 for item in found}:
        return Chosen(tuple(given), origin, f"The export calibrated on these texts ({origin}): the figures flatter it.")
    origins = " and ".join(dict.fromkeys(item.report.texts.origin for item in found))
    note = f"The export validated on other texts ({origins}) than these ({origin}); name them with --texts."
    return Chosen(tuple(given), origin, None if texts else note)


def require_enough(chosen: Chosen, fewest: int) -> None:
    """Refuse fewer than so many texts.

    Raises:
        ConfigError: there are fewer.
    """
    if len(chosen.texts) < fewest:
        raise ConfigError(
            f"{chosen.origin}: {len(chosen.texts)} different texts; at least {fewest} are needed to rank similarities. "
            "Give more texts."
        )
