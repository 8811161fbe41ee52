"""Start a process that runs one model, and hand it texts or the clock."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from benchmark.making import Made, interpreter
from edgeq.data.sessions import Embeddings
from edgeq.data.tokens import Batch, Feeds
from edgeq.errors import EdgeqError
from edgeq.system.worker import Worker

_RUNNER = Path(__file__).with_name("runner.py")
_CALL_LIMIT_S = 3600.0


class Runner:
    """Keep a model loaded in a process of its own; a session of `edgeq.evaluation.parity`, too."""

    def __init__(self, made: Made, threads: int) -> None:
        """Load the model.

        Raises:
            EdgeqError: its environment is missing, or its runtime refuses the model.
        """
        self._worker = Worker([*interpreter(made.row), str(_RUNNER)], made.row.name, time_limit_s=_CALL_LIMIT_S)
        try:
            loaded = self._worker.call(do="load", runtime=made.row.runtime, path=str(made.path), threads=threads)
        except EdgeqError:
            self._worker.close()
            raise
        self.buckets = tuple(loaded["buckets"])

    def embed(self, feeds: Sequence[Feeds]) -> Embeddings:
        """Give float32[texts, dim], batch after batch."""
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder) / "feeds.npz", Path(folder) / "vectors.npy"
            ids = {f"ids_{i}": batch.input_ids for i, batch in enumerate(feeds)}
            masks = {f"mask_{i}": batch.attention_mask for i, batch in enumerate(feeds)}
            np.savez(given, **ids, **masks)
            self._worker.call(do="embed", feeds=str(given), out=str(found))
            vectors: Embeddings = np.load(found)
        return vectors

    def embed_batches(self, batches: Sequence[Batch]) -> Embeddings:
        """Give float32[texts, dim], in the order of the texts."""
        found = self.embed([batch.feeds for batch in batches])
        vectors = np.empty_like(found)
        vectors[[row for batch in batches for row in batch.rows]] = found
        return vectors

    def __call__(self, feeds: Feeds) -> Embeddings:
        """Give float32[batch, dim]."""
        return self.embed([feeds])

    def milliseconds(self, batch: int, sequence: int, runs: int, warmup: int) -> list[float]:
        """Give the time of each run."""
        reply = self._worker.call(do="time", batch=batch, sequence=sequence, runs=runs, warmup=warmup)
        return [float(value) for value in reply["milliseconds"]]

    def __enter__(self) -> Self:
        """Give the runner, to be closed at the end of a `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._worker.close()
