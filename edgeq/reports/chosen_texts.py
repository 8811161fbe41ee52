"""Choose the texts of a card, and FP32's vectors of them where FP32 itself is not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.bundle.golden import read_golden
from edgeq.data.sessions import Embeddings
from edgeq.data.splits import deduplicate, sha256_text, split
from edgeq.data.text_files import default_texts, read_texts
from edgeq.data.tokens import sha256_texts
from edgeq.errors import ConfigError
from edgeq.reports.bundles import Found


@dataclass(frozen=True)
class Chosen:
    """Hold the texts, where they come from, what is to be said of them, and recorded vectors of FP32, if any.

    `recorded` is float32[texts, dim].
    """

    texts: tuple[str, ...]
    origin: str
    note: str | None
    recorded: Embeddings | None = None


def golden(found: Sequence[Found]) -> Chosen:
    """Take the golden texts: their FP32 vectors stand in the bundles.

    Those of the bundle with the lowest limit serve, because there FP32 was cut where all are cut here.
    """
    shortest = min(found, key=lambda item: item.token_limit)
    data = read_golden(shortest.path)
    note = (
        f"The FP32 model is not in the cache: compared on the {len(data.texts)} golden texts of {shortest.name} with "
        "the FP32 vectors recorded there. --against FILE names the model."
    )
    return Chosen(tuple(data.texts), f"golden texts of {shortest.name}", note, data.reference)


def choose(found: Sequence[Found], texts: Path | None, column: str | None) -> Chosen:
    """Read the texts that the user names, or the default validation texts.

    Of a file that the export calibrated on, the fifth that validated there is taken.

    Raises:
        ConfigError: the texts cannot be read.
    """
    given = deduplicate(read_texts(texts or default_texts()[1], column if texts else None))
    origin = texts.name if texts else "default"
    wanted = {item.report.texts.sha256 for item in found}
    digest = sha256_texts(given)
    if wanted == {digest}:
        return Chosen(tuple(given), origin, None)
    fifth = split(given, sha256_text)[1]
    if wanted == {sha256_texts(fifth)}:
        note = f"{origin}: the export calibrated on four fifths of it; the fifth that validated there is compared."
        return Chosen(tuple(fifth), f"{origin} (a fifth, by hash)", note)
    if digest in {item.manifest.calibration.texts.sha256 for item in found}:
        return Chosen(tuple(given), origin, f"The export calibrated on these texts ({origin}): the figures flatter it.")
    origins = " and ".join(dict.fromkeys(item.report.texts.origin for item in found))
    note = f"The export validated on other texts ({origins}) than these ({origin}); name them with --texts."
    return Chosen(tuple(given), origin, None if texts else note)


def require_enough(chosen: Chosen, fewest: int) -> None:
    """Refuse too few texts.

    Raises:
        ConfigError: there are fewer.
    """
    if len(chosen.texts) < fewest:
        raise ConfigError(
            f"{chosen.origin}: {len(chosen.texts)} different texts; at least {fewest} are needed to rank similarities. "
            "Give more texts."
        )
