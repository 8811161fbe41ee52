"""Compare the records of one manifest with each other, and with what the bundle's files say of the longest text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edgeq.bundle.client_files import MODULE_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from edgeq.data.batches import PIXELS
from edgeq.data.tokens import token_limit
from edgeq.quantization import schemes
from edgeq.records import Manifest, TextSet
from edgeq.system.untrusted import oversize, parse_json

# Files by which libraries cut texts, with the keys of the limit in tokens: what `edgeq.bundle.client_files` writes.
LIMITS: Mapping[str, tuple[str, ...]] = {
    MODULE_CONFIG: ("max_seq_length",),
    TOKENIZER_CONFIG: ("model_max_length", "max_length"),
    TOKENIZER: ("truncation.max_length",),
}

_MOST_BYTES = 1 << 30


def disagreements(manifest: Manifest) -> list[str]:
    """Say which records of a manifest do not belong together, each with both values; empty where all do."""
    source, calibration, qdq, artifact = manifest.source, manifest.calibration, manifest.qdq_model, manifest.artifact
    float_model, equalized = manifest.float_model, manifest.equalized_model
    parent = equalized.file.sha256
    links: list[tuple[str, object, str, object]] = [
        ("float_model.source_sha256", float_model.source_sha256, "source.sha256", source.sha256),
        ("equalized_model.source_sha256", equalized.source_sha256, "source.sha256", source.sha256),
        ("calibration.float_model_sha256", calibration.float_model_sha256, "equalized_model.file", parent),
        ("qdq_model.float_model_sha256", qdq.float_model_sha256, "equalized_model.file", parent),
        ("qdq_model.calibration_sha256", qdq.calibration_sha256, "calibration.file", calibration.file.sha256),
        ("artifact.qdq_sha256", artifact.qdq_sha256, "qdq_model.file", qdq.file.sha256),
        ("artifact.target", artifact.target, "target.name", manifest.target.name),
        ("artifact.backend", artifact.backend, "target.backend", manifest.target.backend),
        ("qdq_model.scheme.name", schemes.base_name(qdq.scheme), "target.scheme", manifest.target.scheme),
    ]
    for name, record in (("float_model", float_model), ("equalized_model", equalized), ("qdq_model", qdq)):
        links += [
            (f"{name}.dim", record.dim, "source.dim", source.dim),
            (f"{name}.max_sequence", record.max_sequence, "source.max_sequence", source.max_sequence),
            (f"{name}.inputs", record.inputs, "source.inputs", source.inputs),
        ]
    found = [f"{name} is {value}, but {other} is {needed}" for name, value, other, needed in links if value != needed]
    return found + _of_calibration(manifest)


def _of_calibration(manifest: Manifest) -> list[str]:
    """Compare the calibration's samples with what the source reads, and with how long a text may be."""
    samples, source = manifest.calibration.texts, manifest.source
    kind = "texts" if isinstance(samples, TextSet) else "images"
    if (kind == "images") != (source.inputs == (PIXELS,)):
        return [f"calibration.texts are {kind}, but source.inputs is {source.inputs}"]
    if isinstance(samples, TextSet) and samples.tokens > samples.count * source.max_sequence:
        return [
            f"calibration.texts has {samples.tokens} tokens in {samples.count} texts, but source.max_sequence is "
            f"{source.max_sequence}"
        ]
    return []


def disagreeing_limits(folder: Path, manifest: Manifest, reads_tokenizer: bool) -> list[str]:
    """Say which files of a bundle state another longest text than the one that was validated, each with both values.

    Args:
        folder: of the bundle.
        manifest: of the bundle.
        reads_tokenizer: read tokenizer.json, too, which may have many megabytes.
    """
    if manifest.source.inputs == (PIXELS,):
        return []
    limit = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)
    found = []
    for name, keys in LIMITS.items():
        if name == TOKENIZER and not reads_tokenizer:
            continue
        content = _object(folder / name)
        if isinstance(content, str):
            found.append(f"{name}: {content}")
            continue
        for key, value in _stated(content, keys):
            if value != limit:
                found.append(
                    f"{name}: {key} is {value!r}, but source.max_sequence with the target's buckets is {limit}"
                )
    return found


def _stated(content: Mapping[str, object], keys: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Give the limits that a file states; a fixed length that a model without a mask is padded to is none."""
    for key in keys:
        value: object = content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        is_padding = key == "max_length" and content.get("padding") == "max_length"
        if value is not None and not is_padding:
            yield key, value


def _object(path: Path) -> Mapping[str, object] | str:
    """Read a JSON object, empty where there is no file; or say why it cannot be read."""
    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        return reason
    try:
        content = parse_json(path.read_bytes()) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"not valid JSON ({error})"
    return content if isinstance(content, dict) else f"a JSON {type(content).__name__} where an object is needed"
