"""Load a bundle: find its backend, check this machine's CPU, and make an embedder of texts or images."""

from __future__ import annotations

from pathlib import Path

from edgeq.backends.registry import find
from edgeq.bundle.embedder import Embedder, _log
from edgeq.bundle.manifest import load_manifest, require_cpu
from edgeq.data.batches import PIXELS
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import token_limit
from edgeq.errors import Unsupported
from edgeq.system.host import machine, run_kind


def load(bundle: str | Path, threads: int = 0, allow_failed: bool = False) -> Embedder:
    """Load a bundle's artifact with its tokenizer or image preprocessing.

    Args:
        bundle: OUT/TARGET, as `edgeq export` wrote it.
        threads: 0 takes the target's number.
        allow_failed: load a bundle that missed its gate, too.

    Returns:
        An embedder of texts, or an `ImageEmbedder` for an image model.

    Raises:
        ConfigError: there is no bundle at this path, or edgeq lacks its backend.
        BundleCorrupt: its manifest is not what edgeq writes.
        Unsupported: this CPU lacks flags that the target needs, or the bundle missed its gate.
    """
    path = Path(bundle)
    manifest = load_manifest(path)
    target = manifest.target
    if manifest.status == "failed" and not allow_failed:
        raise Unsupported(
            f"{path}: missed the gate of {target.name} (its parity.json says where); a bundle that passed is needed. "
            "Export another, or give allow_failed=True."
        )
    backend = find(manifest.artifact.backend, str(path))
    require_cpu(target)
    if machine() != target.runs_on.machine:
        _log.warning(
            "%s is made for %s; this machine is %s: its vectors come from what stands in for it (%s)",
            target.name,
            target.runs_on.machine,
            machine(),
            run_kind(target.runs_on),
        )
    codecs = None if manifest.codecs is None else path / manifest.codecs.path
    session = backend.load(manifest.artifact, path, target, threads)
    if manifest.float_model.inputs == (PIXELS,):
        from edgeq.bundle.image_embedder import ImageEmbedder
        from edgeq.data import image_preprocessing  # here: texts need no Pillow

        return ImageEmbedder(session, image_preprocessing.read(path / image_preprocessing.CONFIG), manifest, codecs)
    limit = token_limit(target.buckets_tokens, manifest.source.max_sequence)
    tokenizer = Tokenizer.from_file(path / "tokenizer.json", limit)
    return Embedder(session, tokenizer, manifest, codecs)
