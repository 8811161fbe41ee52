"""Define the record of an index: what is in it, from which texts, by which bundle."""

from __future__ import annotations

from typing import Literal

from edgeq.records import FileRef, Record
from edgeq.records.record import Positive, Sha256

RECORD = "index.json"
CODEC, FINE_CODEC = "codec.npz", "rescoring.npz"
CODES, FINE_CODES, IDS, PROBES, PROBE_VECTORS = "codes.bin", "rescoring.bin", "ids.jsonl", "probes.jsonl", "probes.npy"
FORMAT = 1


class IndexedTexts(Record):
    """Name the file of the texts by content."""

    name: str
    column: str | None
    sha256: Sha256
    count: Positive


class IndexRecord(Record):
    """Describe an index; it is written last, so that a folder with it is whole."""

    format: Literal[1]
    edgeq: str
    bundle: str  # where it was when the index was built
    manifest_sha256: Sha256
    space: Sha256
    form: Sha256
    dim: Positive
    texts: IndexedTexts
    codec: str
    codec_sha256: Sha256
    code_bytes: Positive
    rescoring: str | None  # the codec of the finer codes
    rescoring_sha256: Sha256 | None
    kind: Literal["exact", "hnsw", "ivf"]
    files: tuple[FileRef, ...]
