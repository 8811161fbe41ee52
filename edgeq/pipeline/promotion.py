"""Promote weight products to 16-bit activations, the ones that pay most first, until a target's gate holds.

What a product's codes cost is measured alone (`edgeq.quantization.sensitivity`), and costs add up: how many to promote
follows from what the first measurement missed. So one or two more artifacts are made, not one for each product.

Where all of them promoted do not suffice, the last resort is float products, those first whose weights and inputs lose
most in 8 bits (`edgeq.quantization.weight_losses`), or 16 bits in every activation where nothing may stay float.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from edgeq.evaluation.gate import share_allowed
from edgeq.quantization import schemes
from edgeq.quantization.sensitivity import Sensitivity, Site
from edgeq.records import ParityReport, Promotion, Scheme

_TRIES = 3
_MARGIN = 0.9  # of the loss that may stay: the estimate is good to a tenth
_FLOAT_PRICE = 4.0  # 8-bit multiplications that take as long as one in FP32: four fit into the same register

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
Weighed = Callable[[Sequence[Site]], Sequence[float]]  # gives what the 8-bit weights of each site cost


def until_passed(
    first: AttemptT,
    scheme: Scheme,
    again: Callable[[Scheme], AttemptT],
    ranked: Callable[[], Sensitivity],
    weighed: Weighed | None = None,
    promoted_to: str = "16-bit activations",
) -> tuple[AttemptT, Promotion | None]:
    """Give the first attempt that passes, or the last one.

    Args:
        first: with nothing promoted.
        scheme: of the first attempt.
        again: makes an attempt with a scheme.
        ranked: measures what each product's codes cost; called only where promoting can help.
        weighed: measures what each site's weights cost; called only for the last resort, and None where no product can
            stay float beside integer ones.
        promoted_to: what a promoted product of this scheme has.

    Returns:
        The attempt, and what was promoted; None where nothing was.
    """
    allowed = share_allowed(first.report)
    if allowed is None or not schemes.reads_8bits(scheme):
        return first, None
    sensitivity = ranked()
    ordered = by_value(sensitivity.sites)
    best, promotion, count = first, None, 0
    for _ in range(_TRIES):
        if count == len(ordered):
            break
        count = fewest(sensitivity, ordered, allowed * _MARGIN, more_than=count)
        if weighed is not None and count == len(ordered) and sensitivity.share_left(ordered) > allowed:
            break  # a few float products cost less than all of them promoted and still a few float ones
        best = again(schemes.promote(scheme, _names(ordered[:count])))
        promotion = _promotion(sensitivity.sites, ordered[:count], (), first, best, promoted_to)
        left = share_allowed(best.report)
        if left is None:  # it passed, or no promotion mends what it misses
            return best, promotion
        allowed *= left
    wide = schemes.widened(scheme)
    if weighed is not None:
        return _with_floats(first, scheme, again, sensitivity, weighed(sensitivity.sites), allowed)
    if wide is not None:
        best = again(wide)
        promotion = _promotion(sensitivity.sites, ordered, (), first, best, f"{promoted_to}, and all else with them")
    return best, promotion


def _with_floats(
    first: AttemptT, scheme: Scheme, again: Callable[[Scheme], AttemptT], sensitivity: Sensitivity,
    weights: Sequence[float], allowed: float,
) -> tuple[AttemptT, Promotion]:  # fmt: skip
    """Let the fewest products stay float that let the gate hold, and promote the fewest of the others.

    The last try is FP32 in the target's runtime, embedding tables included.

    Args:
        first: with nothing promoted.
        scheme: of the first attempt.
        again: makes an attempt with a scheme.
        sensitivity: of the first attempt.
        weights: what the 8-bit weights of each site cost.
        allowed: the share of the loss that may stay.
    """
    lost = dict(zip((site.names for site in sensitivity.sites), weights, strict=True))
    ordered = sorted(sensitivity.sites, key=lambda site: (-site.loss - lost[site.names], site.names))
    count = 0
    for further in range(_TRIES, -1, -1):
        is_last = not further or count == len(ordered)
        limit, more = allowed * _MARGIN, range(max(2 * count, 1), len(ordered))
        enough = (n for n in more if share_left(sensitivity, ordered[n:], ordered[:n], lost) <= limit)
        count = len(ordered) if is_last else next(enough, len(ordered))
        floats, others = ordered[:count], by_value(ordered[count:])
        promoted = others[: _fewest_beside(sensitivity, others, floats, lost, limit)]
        best = again(schemes.promote(scheme, _names(promoted), _names(floats), has_float_tables=is_last))
        left = share_allowed(best.report)
        if left is None or is_last:
            break
        allowed *= left
    made = _promotion(sensitivity.sites, promoted, floats, first, best, "16-bit activations")
    return best, made.model_copy(update={"has_float_tables": is_last})


def share_left(
    sensitivity: Sensitivity, promoted: Iterable[Site], floats: Sequence[Site], weights: Mapping[tuple[str, ...], float]
) -> float:
    """Estimate the share of the loss that stays when these sites are promoted and those stay float.

    Args:
        sensitivity: of the products.
        promoted: read 16 bits; a convolution cannot.
        floats: have no codes.
        weights: what the 8-bit weights of each site cost, by its names.
    """
    read = sensitivity.share_left([*(site for site in promoted if not site.is_convolution), *floats])
    whole = max(sum(weights.values()), sensitivity.rest)  # tables lose, too; and losses that overlap sum to more
    gone = sum(weights[site.names] for site in floats) / whole if whole else 0.0
    return max(read - gone * sensitivity.rest / sensitivity.loss, 0.0) if sensitivity.loss else 0.0


def _fewest_beside(
    sensitivity: Sensitivity, others: Sequence[Site], floats: Sequence[Site], weights: Mapping[tuple[str, ...], float],
    limit: float,
) -> int:  # fmt: skip
    """Give how many of these sites to promote beside float ones so that this share of the loss stays; else all."""
    counts = range(len(others))
    return next((n for n in counts if share_left(sensitivity, others[:n], floats, weights) <= limit), len(others))


def by_value(sites: Sequence[Site]) -> list[Site]:
    """Order sites by their loss for each multiplication that promoting doubles, the highest first.

    Convolutions have no form with 16-bit inputs, and are left out.
    """
    matrices = [site for site in sites if not site.is_convolution]
    return sorted(matrices, key=lambda site: (-site.loss / _multiplications(site), site.names))


def fewest(sensitivity: Sensitivity, ordered: Sequence[Site], share: float, more_than: int = 0) -> int:
    """Give how many of the ordered sites to promote so that this share of the loss stays; all, where none suffice."""
    for count in range(more_than + 1, len(ordered)):
        if sensitivity.share_left(ordered[:count]) <= share:
            return count
    return len(ordered)


def _names(sites: Iterable[Site]) -> list[str]:
    return sorted(name for site in sites for name in site.names)


def _multiplications(site: Site) -> int:
    return site.channels * site.outputs


def _promotion(
    sites: Sequence[Site], promoted: Sequence[Site], floats: Sequence[Site], first: Attempt, last: Attempt,
    promoted_to: str,
) -> Promotion:  # fmt: skip
    more = sum(map(_multiplications, promoted)) + (_FLOAT_PRICE - 1.0) * sum(map(_multiplications, floats))
    return Promotion(
        products=tuple(_names(promoted)),
        floats=tuple(_names(floats)),
        of_products=len(_names(sites)),
        promoted_to=promoted_to,
        extra_bytes=last.size_bytes - first.size_bytes,
        extra_multiplications=more / sum(map(_multiplications, sites)),
        missed_before=first.report.failures,
    )
