"""Choose the golden texts or images of a bundle from the validation samples."""

from __future__ import annotations

from edgeq.bundle.golden import GoldenData
from edgeq.bundle.golden_images import GoldenImages, golden_images
from edgeq.data.sessions import Embeddings
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import Tokens, batches, token_feeds
from edgeq.pipeline.stage_results import Floats, Validation

GOLDEN_TEXTS, GOLDEN_IMAGES = 64, 16


def golden_samples(floats: Floats, validation: Validation, embeddings: Embeddings | None) -> GoldenData | GoldenImages:
    """Choose golden texts, evenly spaced by length, or golden images, evenly spaced in their order.

    Args:
        floats: the float model, with the preprocessing of images.
        validation: the samples to choose from, and FP32's vectors of them.
        embeddings: the artifact's vectors of the same samples, float32[samples, dim]; None when it was not run.
    """
    if not isinstance(validation.samples, Tokens):
        rows = evenly_spaced(len(validation.texts), GOLDEN_IMAGES)
        return golden_images(
            floats.config, validation.samples.chosen(rows), [validation.texts[row] for row in rows],
            validation.reference[rows], None if embeddings is None else embeddings[rows],
        )  # fmt: skip
    tokens = validation.samples
    by_length = sorted(range(len(validation.texts)), key=lambda row: len(tokens.ids[row]))
    rows = [by_length[position] for position in evenly_spaced(len(by_length), GOLDEN_TEXTS)]
    chosen = tokens.chosen(rows)
    (batch,) = batches(chosen, batch_size=len(rows), max_tokens=len(rows) * max(len(ids) for ids in chosen.ids))
    order, feeds = [rows[row] for row in batch.rows], token_feeds(batch.feeds)
    return GoldenData(
        tuple(validation.texts[row] for row in order), feeds.input_ids, feeds.attention_mask,
        validation.reference[order], None if embeddings is None else embeddings[order], tokens.pad_id,
    )  # fmt: skip
