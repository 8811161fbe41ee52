"""Compare the records of one manifest with each other, and with what the bundle's files say of the longest text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edgeq.data.batches import PIXELS
from edgeq.quantization import schemes
from edgeq.records import Manifest, TextSet
from edgeq.system.untrusted import oversize, parse_json

# Files by which other libraries cut texts, with the key of the limit in tokens.
LIMITS: Mapping[str, str] = {"sentence_bert_config.json": "max_seq_length"}

_MOST_BYTES = 1 << 20


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


def disagreeing_limits(folder: Path, max_sequence: int) -> list[str]:
    """Say which files of a bundle state another longest text than its records, each with both values.

    Args:
        folder: of the bundle.
        max_sequence: of its source record, in tokens.
    """
    found = []
    for name, key in LIMITS.items():
        path = folder / name
        if not path.is_file():
            continue
        reason = oversize(path, _MOST_BYTES)
        try:
            content = {} if reason is not None else parse_json(path.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            reason = f"not valid JSON ({error})"
        if reason is None and not isinstance(content, dict):
            reason = f"a JSON {type(content).__name__} where an object is needed"
        if reason is not None:
            found.append(f"{name}: {reason}")
        elif content.get(key, max_sequence) != max_sequence:
            found.append(f"{name}: {key} is {content[key]!r}, but source.max_sequence is {max_sequence}")
    return found
