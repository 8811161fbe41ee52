"""Measure a bundle's parity again, on any texts or images, against the FP32 model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.backends.registry import find
from edgeq.bundle.embedder import Embedder
from edgeq.bundle.float_model import cached
from edgeq.bundle.load import load
from edgeq.bundle.manifest import load_manifest, require_cpu
from edgeq.data import end_to_end
from edgeq.data.batches import PIXELS
from edgeq.data.plans import DEFAULT
from edgeq.data.prepare import prepare
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.splits import deduplicate
from edgeq.data.text_files import default_texts, read_texts
from edgeq.data.text_input import Method
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import batches, token_limit
from edgeq.errors import ConfigError
from edgeq.evaluation.tasks import Embed
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline.growing_validation import growing, sizes
from edgeq.pipeline.measure_parity import measure_parity
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import Manifest, ParityReport
from edgeq.system.cache import Cache
from edgeq.system.progress import Progress

if TYPE_CHECKING:
    from edgeq.data.prepare import Items


def validate(
    bundle: Path,
    texts: Path | None,
    column: str | None,
    float_model: Path,
    progress: Progress,
    images: Path | None = None,
) -> ParityReport:
    """Run texts or images through FP32 and a bundle's artifact, with every setting that runs here, and judge parity.

    Args:
        bundle: OUT/TARGET, as `edgeq export` wrote it; one that missed its gate may be measured, too.
        texts: the user's; None takes the default validation texts.
        column: which column of `texts` holds the text.
        float_model: the FP32 model that the bundle was made from.
        progress: called as `progress(stage, done, total)`.
        images: a folder of images, for a bundle of an image model.

    Raises:
        ConfigError: there is no bundle, or the texts or images cannot be used.
        BundleCorrupt: the manifest is not what edgeq writes.
        Unsupported: this CPU lacks flags the target needs.
    """
    manifest = load_manifest(bundle)
    target = manifest.target
    require_cpu(target)
    require_kind(manifest, bundle, texts, images)
    backend = find(manifest.artifact.backend, str(bundle))
    limit = token_limit(target.buckets_tokens, manifest.source.max_sequence)
    items, origin = _items(texts, column, images)
    qdq = cached_qdq(manifest) if texts is None else None  # the artifact itself runs all of the user's own texts
    few = target.gate.parity_texts if texts is None and qdq is None else None
    session = FloatSession.of(float_model)

    def embed(some: Items, done: int) -> Embeddings:
        progress("float32", 0, 1)
        given = prepare(some, origin, bundle, limit)
        vectors = embed_batches(session, batches(given.samples), len(given.samples))
        progress("float32", 1, 1)
        return vectors

    parts = growing(items, sizes(len(items), origin, few), origin, bundle, limit, embed)
    return measure_parity(
        backend, manifest.artifact, bundle, target, parts, manifest.source.max_sequence, partial(progress, "artifact"),
        end_to_end.compare(bundle, manifest.source, limit), qdq,
    ).report  # fmt: skip


def cached_qdq(manifest: Manifest) -> Path | None:
    """Find the QDQ model that a bundle was made from, where the cache still holds it and ONNX Runtime can run it."""
    if not QUANTIZERS[manifest.qdq_model.scheme.kind].writes_integers:
        return None
    return cached(manifest.qdq_model.file, Cache().root)


def _items(texts: Path | None, column: str | None, images: Path | None) -> tuple[Items, str]:
    """Read the texts or list the images to measure parity on; give their origin, too.

    Raises:
        ConfigError: they cannot be used.
    """
    if images is not None:
        from edgeq.data.images import read_folder  # here: texts need no Pillow

        return read_folder(images), images.name
    given = deduplicate(read_texts(texts or default_texts()[1], column if texts else None))
    return given, texts.name if texts else DEFAULT


def require_kind(manifest: Manifest, bundle: Path, texts: Path | None, images: Path | None) -> None:
    """Refuse texts for an image model, and images for a text model.

    Raises:
        ConfigError: the kinds differ.
    """
    takes_images = manifest.float_model.inputs == (PIXELS,)
    if takes_images and (images is None or texts is not None):
        raise ConfigError(
            f"{bundle}: takes images, and was given {'texts' if images is None else 'texts besides'}. "
            "Give a folder with --images, and no --texts."
        )
    if images is not None and not takes_images:
        raise ConfigError(f"{bundle}: takes texts, and was given images; drop --images, or give a file with --texts.")


def embedders(bundle: Path, float_model: Path) -> tuple[Embed, Embed]:
    """Give the functions that embed texts with FP32 and with the bundle's artifact, for `edgeq.evaluation.tasks`.

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
    """Wrap an embedder as a function of texts and the name of its method."""

    def embed(texts: Sequence[str], method: Method) -> Embeddings:
        if method == "encode":
            return embedder.encode(texts)
        return embedder.encode_query(texts) if method == "encode_query" else embedder.encode_document(texts)

    return embed
