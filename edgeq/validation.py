"""Measure a bundle's parity again, on any texts, against the FP32 model it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgeq import parity
from edgeq.backends.contract import Embeddings, Session, embed_batches
from edgeq.bundle import load_manifest, require_cpu
from edgeq.corpora import deduplicate, default_texts, read_texts
from edgeq.embedder import Embedder, load
from edgeq.evaluation import Embed
from edgeq.machine import place
from edgeq.records import Manifest, ParityReport
from edgeq.reference import FloatSession
from edgeq.texts import Tokenizer, batches, text_set, token_limit
from edgeq.textsets import spread

Report = Callable[[str, int, int], None]


def validate(bundle: Path, texts: Path | None, column: str | None, float_model: Path, report: Report) -> ParityReport:
    """Run texts through a bundle's artifact and through FP32, measure, and judge by the target's gate.

    Args:
        bundle: OUT/TARGET, as `edgeq export` wrote it; one that missed its gate may be measured, too.
        texts: the user's; None takes the default validation texts.
        column: which column of `texts` holds the text.
        float_model: the FP32 model that the bundle was made from.
        report: called as `report(stage, done, total)`.

    Raises:
        ConfigError: there is no bundle, or the texts cannot be used.
        BundleCorrupt: the manifest is not what edgeq writes.
        Unsupported: this CPU lacks flags the target needs.
    """
    manifest = load_manifest(bundle)
    target = manifest.target
    require_cpu(target)
    most = target.gate.parity_texts if texts is None else None  # the user's own run whole, however long that takes
    chosen = spread(deduplicate(read_texts(texts or default_texts()[1], column if texts else None)), most)
    limit = token_limit(target.buckets_tokens, manifest.source.max_sequence)
    tokens = Tokenizer.from_file(bundle / "tokenizer.json", limit).encode(chosen)
    report("float32", 0, 1)
    reference = embed_batches(FloatSession.of(float_model), batches(tokens), len(chosen))
    report("float32", 1, 1)
    report("artifact", 0, 2)
    session = _session(manifest, bundle)
    embeddings = embed_batches(session, batches(tokens), len(chosen))
    report("artifact", 1, 2)
    invariance = parity.invariance(session, tokens, limit, target.buckets_tokens, target.gate.parity_texts)
    report("artifact", 2, 2)
    return parity.report(
        target,
        place(target.runs_on),
        manifest.artifact.placement,
        reference,
        embeddings,
        chosen,
        text_set(texts.name if texts else "default", chosen, tokens),
        invariance,
    )


def embedders(bundle: Path, float_model: Path) -> tuple[Embed, Embed]:
    """Give what embeds texts with FP32, and what embeds them with the bundle's artifact, as `evaluation` takes them.

    Raises:
        ConfigError: there is no bundle, or the float model cannot be loaded.
        BundleCorrupt: the manifest is not what edgeq writes.
        Unsupported: this CPU lacks flags the target needs.
    """
    artifact = load(bundle, allow_failed=True)
    tokenizer = Tokenizer.from_file(bundle / "tokenizer.json", artifact.max_sequence)
    reference = Embedder(FloatSession.of(float_model), tokenizer, artifact.manifest)
    return embed_with(reference), embed_with(artifact)


def embed_with(embedder: Embedder) -> Embed:
    """Give a function of texts and the name of a prompt."""

    def embed(texts: Sequence[str], prompt: str | None) -> Embeddings:
        return embedder.encode(texts, prompt_name=prompt)

    return embed


def _session(manifest: Manifest, bundle: Path) -> Session:
    """Load the artifact in its runtime."""
    from edgeq import backends

    backend = backends.find(manifest.artifact.backend, str(bundle))
    return backend.load(manifest.artifact, bundle, manifest.target)
