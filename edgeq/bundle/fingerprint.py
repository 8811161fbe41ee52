"""Name the vector space of a bundle, and the form in which it computes vectors, by sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from edgeq.data.tokens import token_limit
from edgeq.records import Manifest


def space(manifest: Manifest) -> str:
    """Hash what decides a vector but for rounding: the source's files, modules, prompts, dimension, and the cut.

    Vectors of one space may be searched with each other. Another cut gives long texts other vectors.
    """
    source = manifest.source
    return _hashed(
        {
            "source": source.sha256,
            "modules": source.modules,
            "prompts": source.prompts,
            "default_prompt_name": source.default_prompt_name,
            "dim": source.dim,
            "limit": token_limit(manifest.target.buckets_tokens, source.max_sequence),
            "query_length": source.query_length,
            "document_length": source.document_length,
        }
    )


def form(manifest: Manifest) -> str:
    """Hash what decides the rounding: the artifact's files, the backend, and the settings of its runtime."""
    return _hashed(
        {
            "files": [file.sha256 for file in manifest.artifact.files],
            "backend": manifest.artifact.backend,
            "runtime": manifest.target.runtime,
        }
    )


def _hashed(parts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
