"""Run a source in torch, whose vectors are the reference of every runtime.

torch runs in a child process, `python -m edgeq.frontend.torch.session`: its end frees memory and threads, and a crash
inside it becomes a message.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from edgeq.data.batches import AnyFeeds
from edgeq.data.sessions import Embeddings
from edgeq.data.tokens import Feeds, token_feeds
from edgeq.errors import ConfigError, EdgeqError
from edgeq.frontend.locate import Located, from_json, locate, to_json
from edgeq.frontend.torch.sentence_transformers import truncated_to
from edgeq.records import Source
from edgeq.system.child_server import Actions, pack, serve_standard_streams, unpack
from edgeq.system.worker import Worker, unpack_reply

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_POOLING = "Pooling:"


def reopen(source: Source, model: str | None = None, trust_remote_code: bool | None = None) -> Located:
    """Find the source of a bundle again.

    Args:
        source: the record in the bundle's manifest.
        model: its path or name now; None uses the name in the record.
        trust_remote_code: whether the code that ran for the bundle may run again; none else does.

    Raises:
        ConfigError: nothing is found there, or another model.
        Unsupported: the model's own code is needed and not trusted.
    """
    if source.kind in ("onnx", "module"):
        raise ConfigError(f"{source.name}: was given as {source.kind}; there is no directory to load into torch")
    pooling = next((name.removeprefix(_POOLING) for name in source.modules if name.startswith(_POOLING)), None)
    given = pooling if source.kind == "transformers" else None
    may_run = trust_remote_code if source.code else False
    located = locate(model or source.name, given, trust_remote_code=may_run)
    dim = truncated_to(source.modules)
    if located.sha256 != source.sha256 and dim is not None:  # cut by the export, not by the model's own configuration
        located = locate(model or source.name, given, dim=dim, trust_remote_code=may_run)
    if located.sha256 != source.sha256:
        raise ConfigError(
            f"{model or source.name}: what is found there has sha256 {located.sha256[:12]}..., the bundles' source "
            f"{source.sha256[:12]}.... Name the right one with --model."
        )
    return located


class TorchSession:
    """Keep a child process with the loaded model; calling it embeds a batch."""

    def __init__(self, located: Located) -> None:
        """Load the model.

        Raises:
            LoweringFailed: torch is not installed, or cannot load the model.
        """
        self._worker = Worker([sys.executable, "-m", "edgeq.frontend.torch.session"], "torch")
        self._worker.call(do="load", located=to_json(located))

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Embed a batch of texts, float32[batch, dim].

        Raises:
            ConfigError: the feeds are images.
            LoweringFailed: the model fails, or its process dies.
        """
        tokens = token_feeds(feeds)
        reply = self._worker.call(do="embed", ids=pack(tokens.input_ids), mask=pack(tokens.attention_mask))
        embeddings: Embeddings = unpack_reply(reply["embeddings"])
        return embeddings


class _Child:
    """Answer requests with one model loaded in torch."""

    def __init__(self) -> None:
        """Load nothing yet."""
        self._model: SentenceTransformer | None = None

    def actions(self) -> Actions:
        """Give the function for each value of "do"."""
        return {"load": self._load, "embed": self._embed}

    def _load(self, located: dict[str, Any]) -> dict[str, Any]:
        from edgeq.frontend.torch.load import load_model

        try:
            self._model = load_model(from_json(located))
        except EdgeqError as error:  # its message says all; the server would put the error's name before it
            return {"error": str(error)}
        return {}

    def _embed(self, ids: dict[str, Any], mask: dict[str, Any]) -> dict[str, Any]:
        from edgeq.frontend.torch.convert import torch_embeddings

        if self._model is None:
            raise ValueError("no model is loaded; a load is needed first")
        (embeddings,) = torch_embeddings(self._model, (Feeds(unpack(ids), unpack(mask)),))
        return {"embeddings": pack(embeddings)}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # as in `edgeq.frontend.torch.convert`
    serve_standard_streams(lambda announce: _Child().actions())
