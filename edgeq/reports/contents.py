"""Define the records of a parity card, from which the tables and the HTML page are rendered."""

from __future__ import annotations

from typing import Literal

from edgeq.analysis.layer_errors import LayerErrors
from edgeq.bundle.turns import Latency, Ratio
from edgeq.records import Measures, Record, RunKind, Sha256, Status, TextSet
from edgeq.vectors.measure import CodeFigures


class RunTime(Record):
    """Hold the latency of one text at one length, in a child process that took turns with those of the other rows."""

    tokens: int
    threads: int
    num_runs: int
    latency: Latency
    speedup: Ratio | None  # the reference's time over this one's; None for the reference: FP32, or else the first row
    peak_memory_bytes: int


class BundleFacts(Record):
    """Hold what the card repeats from a bundle's records."""

    target: str
    summary: str
    backend: str
    scheme: str
    status: Status  # as recorded
    token_limit: int
    qdq_sha256: Sha256
    recorded: Measures | None  # by the export, on its own validation texts
    recorded_on: RunKind


class Row(Record):
    """Hold the figures of one runtime, or the reason why a figure is missing.

    `measures` are against FP32; the row of FP32 itself has none.
    """

    name: str
    kind: Literal["float32", "torch", "artifact"]
    bundle: BundleFacts | None  # of an artifact
    ran_on: RunKind
    reason: str | None  # why there are no measures
    size_bytes: int | None
    measures: Measures | None
    cosine_percentiles: tuple[
        float, ...
    ]  # centred, with FP32, of the texts: percentile 0, 1, ... 100; empty without measures
    sts_spearman: float | None
    ndcg_at_10: float | None
    latency: tuple[RunTime, ...]
    latency_reason: str | None
    operators: dict[str, dict[str, int]]  # operator -> dtypes it computes on -> count
    operators_reason: str | None


class Pair(Record):
    """Hold the centred cosines between the vectors of two runtimes."""

    first: str
    second: str
    cosine_mean: float
    cosine_min: float


class TextError(Record):
    """Hold the error of one runtime's vector of one text against FP32's."""

    name: str  # of the row
    cosine: float
    max_abs_error: float


class WorstText(Record):
    """Hold a text with a low centred cosine with FP32, and every artifact's error on it."""

    text: str  # its beginning
    tokens: int
    errors: tuple[TextError, ...]


class Layers(Record):
    """Hold the error of each layer's tensors for the artifacts of one QDQ model, or the reason why it is missing."""

    scheme: str
    names: tuple[str, ...]  # of the rows
    errors: LayerErrors | None
    reason: str | None


class Card(Record):
    """Hold the figures of all bundles of one model, of FP32 and of torch."""

    format: Literal[1]
    edgeq: str
    model: str
    source_sha256: Sha256
    float_model_sha256: Sha256
    machine: str
    texts: TextSet
    token_limit: int  # all texts are cut here, for every runtime
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    worst_texts: tuple[WorstText, ...]
    layers: tuple[Layers, ...]
    sts_pairs: int | None
    retrieval_queries: int | None
    notes: tuple[str, ...]
    codes: tuple[CodeFigures, ...] = ()  # of the retrieval set; floats of pairs of runtimes last
    end_to_end: tuple[str, ...] = ()  # what the bundles' reports say of the source's own path, each sentence once

    def artifacts(self) -> tuple[Row, ...]:
        """Give the rows of bundles."""
        return tuple(row for row in self.rows if row.kind == "artifact")
