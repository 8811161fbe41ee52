"""Run a source in torch: the vectors that every other runtime's are meant to be.

torch lives in a child process, `python -m edgeq.frontend.torch.session`, so that its memory is given back, its
threads leave the cores, and a crash inside it is a message.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeq.data.batches import AnyFeeds
from edgeq.data.sessions import Embeddings
from edgeq.data.tokens import Feeds, token_feeds
from edgeq.errors import ConfigError, EdgeqError
from edgeq.frontend.locate import Located, locate
from edgeq.frontend.torch.sentence_transformers import truncated_to
from edgeq.records import Source
from edgeq.system.worker import Worker, pack, unpack

_POOLING = "Pooling:"


def reopen(source: Source, model: str | None = None) -> Located:
    """Find the source of a bundle again.

    Args:
        source: as the manifest describes it.
        model: where it lies now; None looks for it under the name that the manifest has.

    Raises:
        ConfigError: it is not there, or is another model.
    """
    if source.kind in ("onnx", "module"):
        raise ConfigError(f"{source.name}: was given as {source.kind}; there is no directory to load into torch")
    pooling = next((name.removeprefix(_POOLING) for name in source.modules if name.startswith(_POOLING)), None)
    given = pooling if source.kind == "transformers" else None
    located = locate(model or source.name, given)
    dim = truncated_to(source.modules)
    if located.sha256 != source.sha256 and dim is not None:  # cut by the export, not by the model's own configuration
        located = locate(model or source.name, given, dim=dim)
    if located.sha256 != source.sha256:
        raise ConfigError(
            f"{model or source.name}: what is found there has sha256 {located.sha256[:12]}..., the bundles' source "
            f"{source.sha256[:12]}.... Name the right one with --model."
        )
    return located


class TorchSession:
    """Keep a child with the loaded model; call it with feeds to get float32[batch, dim]."""

    def __init__(self, located: Located) -> None:
        """Load the model.

        Raises:
            LoweringFailed: torch is not installed, or cannot load the model.
        """
        self._worker = Worker([sys.executable, "-m", "edgeq.frontend.torch.session"], "torch")
        self._worker.call(do="load", located={**asdict(located), "directory": str(located.directory)})

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the sentence embeddings, float32[batch, dim]."""
        tokens = token_feeds(feeds)
        reply = self._worker.call(do="embed", ids=pack(tokens.input_ids), mask=pack(tokens.attention_mask))
        embeddings: Embeddings = unpack(reply["embeddings"])
        return embeddings


def _load(request: dict[str, Any]) -> Callable[[Feeds], Embeddings]:
    """Load the model in this process."""
    from edgeq.frontend.torch import export
    from edgeq.frontend.torch.load import load

    fields = request["located"]
    model = load(Located(**{**fields, "directory": Path(fields["directory"])}))
    return lambda feeds: export.torch_embeddings(model, (feeds,))[0]


def main() -> int:
    """Answer requests on standard input until it ends; what a library prints goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    embed: Callable[[Feeds], Embeddings] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: dict[str, Any] = {}
            if request["do"] == "load":
                embed = _load(request)
            elif embed is not None:
                reply = {"embeddings": pack(embed(Feeds(unpack(request["ids"]), unpack(request["mask"]))))}
        except EdgeqError as error:
            reply = {"error": str(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
