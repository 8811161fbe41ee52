"""Promote weight products to 16-bit activations, the ones that pay most first, until a target's gate holds.

What a product's codes cost is measured alone (`edgeq.quantization.sensitivity`), and costs add up: how many to promote
follows from what the first measurement missed. So one or two more artifacts are made, not one for each product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from edgeq.evaluation.gate import share_allowed
from edgeq.quantization import schemes
from edgeq.quantization.sensitivity import Sensitivity, Site
from edgeq.records import ParityReport, Promotion, Scheme

_TRIES = 3
_MARGIN = 0.9  # of the loss that may stay: the estimate is good to a tenth

_log = logging.getLogger(__name__)


class Attempt(Protocol):
    """Hold one artifact of a target, with what parity says of it."""

    @property
    def report(self) -> ParityReport:
        """Give the parity report."""
        ...

    @property
    def size_bytes(self) -> int:
        """Give the size of the artifact's files."""
        ...


AttemptT = TypeVar("AttemptT", bound=Attempt)


def until_passed(
    first: AttemptT, scheme: Scheme, again: Callable[[Scheme], AttemptT], ranked: Callable[[], Sensitivity]
) -> tuple[AttemptT, Promotion | None]:
    """Give the first attempt that passes, or the last one.

    Args:
        first: with nothing promoted.
        scheme: of the first attempt.
        again: makes an attempt with a scheme.
        ranked: measures what each product's codes cost; called only where promoting can help.

    Returns:
        The attempt, and what was promoted; None where nothing was.
    """
    allowed = share_allowed(first.report)
    if allowed is None:
        return first, None
    sensitivity = ranked()
    ordered = by_value(sensitivity.sites)
    best, promotion, count = first, None, 0
    for _ in range(_TRIES):
        if count == len(ordered):
            break
        count = fewest(sensitivity, ordered, allowed * _MARGIN, more_than=count)
        names = [name for site in ordered[:count] for name in site.names]
        _log.info("promoting %d of %d products", len(names), sum(len(site.names) for site in ordered))
        best = again(schemes.promote(scheme, names))
        promotion = _promotion(ordered, count, first, best)
        left = share_allowed(best.report)
        if left is None:  # it passed, or no promotion mends what it misses
            break
        allowed *= left
    return best, promotion


def by_value(sites: Sequence[Site]) -> list[Site]:
    """Order sites by their loss for each multiplication that promoting doubles, the highest first."""
    return sorted(sites, key=lambda site: (-site.loss / (site.channels * site.outputs), site.names))


def fewest(sensitivity: Sensitivity, ordered: Sequence[Site], share: float, more_than: int = 0) -> int:
    """Give how many of the ordered sites to promote so that this share of the loss stays; all, where none suffice."""
    for count in range(more_than + 1, len(ordered)):
        if sensitivity.share_left(ordered[:count]) <= share:
            return count
    return len(ordered)


def _promotion(ordered: Sequence[Site], count: int, first: Attempt, last: Attempt) -> Promotion:
    multiplications = [site.channels * site.outputs for site in ordered]
    return Promotion(
        products=tuple(sorted(name for site in ordered[:count] for name in site.names)),
        of_products=sum(len(site.names) for site in ordered),
        extra_bytes=last.size_bytes - first.size_bytes,
        extra_multiplications=sum(multiplications[:count]) / sum(multiplications),
        missed_before=first.report.failures,
    )
