"""Give the validation samples in growing parts: few first, and more only while a limit of the gate is undecided."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeq.data.plans import DEFAULT, FEWEST_JUDGED_TEXTS
from edgeq.data.prepare import prepare
from edgeq.data.sessions import Embeddings
from edgeq.pipeline.stage_results import Validation

if TYPE_CHECKING:
    from edgeq.data.prepare import Items

FIRST_TEXTS = 512  # of the default set


def sizes(count: int, origin: str, first: int | None) -> tuple[int, ...]:
    """List how many samples each part holds, those of the parts before it included: each twice as many.

    Args:
        count: of all samples.
        origin: of the samples; the user's own all run at once.
        first: at most so many in the first part, where one run takes seconds; None leaves it to the set.
    """
    begin = FIRST_TEXTS if origin == DEFAULT else count
    if first is not None:
        begin = min(begin, max(first, FEWEST_JUDGED_TEXTS))
    found = [min(begin, count)]
    while found[-1] < count:
        found.append(min(2 * found[-1], count))
    return tuple(found)


def growing(
    items: Items, parts: tuple[int, ...], origin: str, config: Path, limit: int,
    embed: Callable[[Items, int], Embeddings],
) -> Iterator[Validation]:  # fmt: skip
    """Prepare and embed the samples in growing parts; what is not asked for is not made.

    Args:
        items: all texts or image files, in a fixed order.
        parts: the result of `sizes`.
        origin: of the samples.
        config: the folder with the model's tokenizer or preprocessing.
        limit: the most tokens of a text.
        embed: gives FP32's vectors of samples, the second argument the place of the first of them.
    """
    reference: list[Embeddings] = []
    done = 0
    for size in parts:
        reference.append(embed(items[done:size], done))
        given = prepare(items[:size], origin, config, limit)
        yield Validation(given.names, given.samples, given.record, np.concatenate(reference))
        done = size
