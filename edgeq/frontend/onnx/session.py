"""Run the user's ONNX file unchanged in ONNX Runtime, as the reference for the float model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgeq.data.tokens import Feeds
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.onnx.interface import Inputs, Outputs
from edgeq.frontend.onnx.pooling_heads import Head, apply_head, normalized
from edgeq.graph.float_session import RUNTIME_ERRORS

FloatArray = NDArray[np.float32]


def _bare(message: str) -> str:
    """Remove the names of ONNX Runtime's own files and functions from its message."""
    said = re.sub(r"/onnxruntime_src/\S+ .*?\) ", "", message.rsplit("Status Message:", 1)[-1])
    return f"{' '.join(said.split()).rstrip('.')}."


class GivenSession:
    """Keep the user's file loaded; calling it embeds a batch."""

    def __init__(self, path: Path, inputs: Inputs, outputs: Outputs, head: Head) -> None:
        """Load the file.

        Args:
            path: the file.
            inputs: the roles of its inputs.
            outputs: its outputs with vectors and token vectors.
            head: the modules that numpy applies to its token vectors, or the normalisation of its vectors.

        Raises:
            ConfigError: ONNX Runtime cannot load it.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as error:
            raise ConfigError(f"{path.name}: ONNX Runtime cannot load it: {error}") from error
        self._name, self._inputs, self._outputs, self._head = path.stem, inputs, outputs, head

    def __call__(self, feeds: Feeds) -> FloatArray:
        """Embed a batch of texts, float32[batch, dim].

        Raises:
            ConfigError: ONNX Runtime cannot run the file on these tokens.
            Unsupported: its token vectors are not one for each token.
        """
        wanted = self._outputs.embedding or self._outputs.hidden
        try:
            (found,) = self._session.run([wanted], self._inputs.named(feeds))
        except RUNTIME_ERRORS as error:
            shape = "x".join(str(size) for size in feeds.input_ids.shape)
            raise ConfigError(
                f"{self._name}: ONNX Runtime cannot run it on {shape} tokens with ids up to {feeds.input_ids.max()}: "
                f"{_bare(str(error))} If the model fixes sizes, export it with both axes free; if its tables are "
                "smaller, give --max-sequence, or the tokenizer that belongs to it."
            ) from error
        found = np.asarray(found, np.float32)
        if self._outputs.embedding is None and found.shape[:2] != feeds.input_ids.shape:
            raise Unsupported(
                f"{self._name}: gives {list(found.shape)} for {list(feeds.input_ids.shape)} tokens; a vector for each "
                "token, padding included, is needed. Let the model keep the length of its input."
            )
        if self._outputs.embedding is None:
            return apply_head(self._head, found, feeds.attention_mask)
        return normalized(found) if self._head.normalize else found
