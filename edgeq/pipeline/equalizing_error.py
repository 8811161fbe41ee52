"""Check that an equalised model gives the float model's vectors, within what FP32 itself rounds away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from edgeq.data.batches import Batch
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.errors import EdgeqError
from edgeq.graph import float_noise
from edgeq.graph.float_session import FloatSession

TOLERANCE = 1e-5  # more where the model's own FP32 is noisier
_NOISE_BATCHES = 4


def equalizing_error(
    before: onnx.ModelProto, after: onnx.ModelProto, batches: Sequence[Batch], old: Embeddings
) -> float:
    """Check that equalising kept the FP32 embeddings of texts that were not observed, and give the largest error.

    Args:
        before: the float model.
        after: the equalised one.
        batches: of those texts.
        old: what the float model gives for them, float32[texts, dim].

    Raises:
        EdgeqError: an embedding moved by more than 1e-5 of the largest value and 4 times the model's noise.
    """
    new = embed_batches(FloatSession.of(after), batches, len(old))
    error = float(np.abs(old - new).max()) / max(1.0, float(np.abs(old).max()))
    if not error <= TOLERANCE:
        moved = np.abs(old - new).max(axis=1)
        most = sorted(batches, key=lambda batch: float(moved[list(batch.rows)].max()), reverse=True)[:_NOISE_BATCHES]
        noise = max(_noise(before, most, old), _noise(after, most, new))
        if not error <= float_noise.allowed(noise, TOLERANCE):
            raise EdgeqError(
                f"equalising moved the FP32 embeddings by {error:.2e}; at most "
                f"{float_noise.allowed(noise, TOLERANCE):.1e} is allowed, where the model's own FP32 differs from its "
                f"FP64 by {noise:.1e}: please report the model"
            )
    return error


def _noise(model: onnx.ModelProto, batches: Sequence[Batch], vectors: Embeddings) -> float:
    """Give how far the FP32 vectors of a model are from FP64, of the largest value.

    Texts differ tenfold in it, and so do two forms of one function on one text: so it is measured on the batches that
    moved most, and in both forms.
    """
    given = [{"sentence_embedding": vectors[list(batch.rows)]} for batch in batches]
    return float_noise.noise(model, [batch.feeds for batch in batches], given, least=1.0)["sentence_embedding"]
