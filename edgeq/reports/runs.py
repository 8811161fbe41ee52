"""Run the same texts through every runtime; one that cannot run on this machine gives an error instead of vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeq.backends.registry import find
from edgeq.bundle.embedder import Embedder
from edgeq.bundle.manifest import require_cpu
from edgeq.data.sessions import Embeddings, Session, embed_batches
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import batches
from edgeq.errors import (
    ConfigError,
    DeviceUnavailable,
    EdgeqError,
    LoweringFailed,
    TimedOut,
    ToolMissing,
    Unsupported,
)
from edgeq.evaluation import parity, tasks
from edgeq.evaluation.datasets import RetrievalSet, StsPairs
from edgeq.frontend.torch.session import TorchSession, reopen
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline.validate import embed_with
from edgeq.records import Manifest, RunKind
from edgeq.reports.bundles import Found
from edgeq.system.host import run_kind

# Errors of one runtime that leave its row blank; the others still run.
_BLANK = (ToolMissing, Unsupported, LoweringFailed, DeviceUnavailable, TimedOut)
FLOAT, _TORCH = "FP32 ONNX", "torch"


@dataclass(frozen=True)
class Data:
    """Hold the inputs of every runtime: texts, the number of tokens to cut them at, and data sets."""

    texts: tuple[str, ...]
    limit: int
    sts: StsPairs | None
    retrieval: RetrievalSet | None


@dataclass(frozen=True)
class Runner:
    """Describe one runtime of a card, and load it.

    Attributes:
        name: of the row.
        kind: of the row.
        open: loads the runtime; may raise an error that leaves the row blank.
        ran_on: the kind of run on this machine.
        buckets_tokens: the sequence lengths of a static artifact.
        tokenizer: the path of its tokenizer.json.
        manifest: of the bundle, or of any bundle of the model.
    """

    name: str
    kind: Literal["float32", "torch", "artifact"]
    open: Callable[[], Session]
    ran_on: RunKind
    buckets_tokens: tuple[int, ...]
    tokenizer: Path
    manifest: Manifest


@dataclass(frozen=True)
class Run:
    """Hold one runtime's vectors, float32[texts, dim], and data set figures, or the error that prevented them."""

    runner: Runner
    embeddings: Embeddings | None
    error: EdgeqError | None
    invariance: float
    sts_spearman: float | None
    ndcg_at_10: float | None
    figures_error: str | None
    retrieved: tuple[Embeddings, Embeddings] | None = None  # of the retrieval set: queries, documents


def runners(
    found: Sequence[Found], float_model: Path | None, model: str | None, trust_remote_code: bool | None = None
) -> tuple[Runner, ...]:
    """List the runtimes: FP32 in ONNX Runtime (where its file is found), torch, and every bundle's artifact."""
    manifest, tokenizer = found[0].manifest, found[0].path / "tokenizer.json"

    def open_torch() -> Session:
        try:
            return TorchSession(reopen(manifest.source, model, trust_remote_code))
        except ConfigError as error:
            raise Unsupported(f"the source cannot be opened: {error}") from error

    made = []
    if float_model is not None:
        made.append(Runner(FLOAT, "float32", lambda: FloatSession.of(float_model), "device", (), tokenizer, manifest))
    made.append(Runner(_TORCH, "torch", open_torch, "device", (), tokenizer, manifest))
    return (*made, *(_artifact(item) for item in found))


def run(runner: Runner, data: Data) -> Run:
    """Load one runtime, embed all texts, measure invariance, and score the data sets.

    Texts are tokenized by the runtime's own tokenizer, cut at the common limit.
    """
    try:
        session = runner.open()
        tokenizer = Tokenizer.from_file(runner.tokenizer, data.limit)
        tokens = tokenizer.encode(data.texts)
        embeddings = embed_batches(session, batches(tokens), len(tokens.ids))
        invariance = parity.invariance(session, tokens, data.limit, runner.buckets_tokens)
        sts, ndcg, problem, retrieved = _figures(Embedder(session, tokenizer, runner.manifest), data)
    except _BLANK as error:
        return Run(runner, None, error, 0.0, None, None, None)
    return Run(runner, embeddings, None, invariance, sts, ndcg, problem, retrieved)


def _artifact(found: Found) -> Runner:
    """Describe the runtime of a bundle's artifact, loaded by its backend."""
    manifest = found.manifest
    target = manifest.target

    def load() -> Session:
        try:
            backend = find(manifest.artifact.backend, found.name)
        except ConfigError as error:
            raise Unsupported(f"{error}. Use the edgeq that wrote the bundle.") from error
        backend.tools()
        require_cpu(target)
        return backend.load(manifest.artifact, found.path, target)

    tokenizer = found.path / "tokenizer.json"
    return Runner(found.name, "artifact", load, run_kind(target.runs_on), target.buckets_tokens, tokenizer, manifest)


def _figures(
    embedder: Embedder, data: Data
) -> tuple[float | None, float | None, str | None, tuple[Embeddings, Embeddings] | None]:
    """Score the given data sets; give Spearman, nDCG@10, the reason why one could not be scored, and the vectors."""
    embed = embed_with(embedder)
    sts = ndcg = retrieved = None
    try:
        if data.sts is not None:
            vectors = (embed(data.sts.first, "encode"), embed(data.sts.second, "encode"))
            sts = tasks.sts_spearman(*vectors, data.sts.scores)
        if data.retrieval is not None:
            queries = embed(data.retrieval.queries, "encode_query")
            documents = embed(data.retrieval.documents, "encode_document")
            ndcg = tasks.retrieval(queries, documents, data.retrieval.qrels).ndcg_at_10
            retrieved = (queries, documents)
    except ConfigError as error:
        return sts, ndcg, str(error), None
    return sts, ndcg, None, retrieved
