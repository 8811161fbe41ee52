"""Build an index of texts: embed, encode and append a few hundred at a time; a killed run goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle import fingerprint
from edgeq.bundle.manifest import MANIFEST
from edgeq.codecs.codec import Codec, read_codec
from edgeq.codecs.fit import FEWEST_SAMPLES, fit_codec
from edgeq.codecs.names import CodecName, parse
from edgeq.codecs.statistics import FEWEST_VECTORS, VectorStatistics, read_statistics, require_vectors
from edgeq.data.splits import evenly_spaced
from edgeq.errors import ConfigError
from edgeq.records import Manifest
from edgeq.system.files import file_ref, replacing, sha256_file, storage_errors, write_bytes
from edgeq.system.progress import Progress
from edgeq.vectors import approximate, code_file
from edgeq.vectors.index import RESCORING_CODEC, read_index
from edgeq.vectors.records import (
    CODEC,
    CODES,
    FINE_CODEC,
    FINE_CODES,
    FORMAT,
    IDS,
    PROBE_VECTORS,
    PROBES,
    RECORD,
    IndexedTexts,
    IndexRecord,
)
from edgeq.vectors.texts import TextStream
from edgeq.version import VERSION

Vectors = NDArray[np.float32]

PROBE_TEXTS = 64
_FINE_KINDS = ("float32", "float16", "int8", "int8-vector")
_STEP = 256  # texts; of seconds each, which is what a kill can lose
_JOURNAL, _SAMPLE = "building.json", "sample.bin"
_SAMPLES = 2 * FEWEST_SAMPLES  # to train on; statistics take a tenth
_FILES = (CODEC, FINE_CODEC, CODES, FINE_CODES, IDS, PROBES, PROBE_VECTORS, *approximate.FILES.values(), _SAMPLE)


@dataclass(frozen=True)
class IndexRequest:
    """Ask for an index.

    Attributes:
        bundle: OUT/TARGET.
        manifest: of the bundle.
        embed: embeds documents with the bundle, float32[texts, dim].
        texts: to be indexed.
        codec: of the codes that are searched.
        rescoring: of the finer codes; "" for none; None leaves it to the codec: centred int8 where that is finer.
        kind: of the index.
        folder: where it goes.
        overwrite: replace an index of other inputs.
    """

    bundle: Path
    manifest: Manifest
    embed: Callable[[Sequence[str]], Vectors]
    texts: TextStream
    codec: str
    rescoring: str | None
    kind: approximate.Kind
    folder: Path
    overwrite: bool = False


def build(request: IndexRequest, progress: Progress) -> IndexRecord:
    """Build an index, go on with one that a killed run left, or return the record of the same one.

    Raises:
        ConfigError: the folder holds something else, another process builds there, the texts cannot be read or are too
            few, the codec does not exist or does not fit the kind, or a vector is not finite.
        ToolMissing: FAISS is needed and not installed.
        StorageFailed: the disk refuses.
    """
    name, fine = parse(request.codec), _rescoring(request)
    approximate.require_kind(request.kind, name)
    asked = _asked(request, fine)
    with storage_errors(f"building the index {request.folder}"):
        request.folder.mkdir(parents=True, exist_ok=True)
        with _alone(request.folder):
            found = _prepared(request, asked)
            return found if found is not None else _built(request, name, fine, asked, progress)


def _rescoring(request: IndexRequest) -> str | None:
    """Give the codec of the finer codes, or None."""
    if request.rescoring is None:
        return None if parse(request.codec).kind in _FINE_KINDS else RESCORING_CODEC
    return request.rescoring or None


def _asked(request: IndexRequest, fine: str | None) -> dict[str, object]:
    """Give what decides the content of an index."""
    if fine is not None:
        parse(fine)
    return {
        "format": FORMAT,
        "manifest": sha256_file(request.bundle / MANIFEST),
        "texts": request.texts.sha256(),
        "column": request.texts.column,
        "codec": request.codec,
        "rescoring": fine,
        "kind": request.kind,
    }


def _prepared(request: IndexRequest, asked: dict[str, object]) -> IndexRecord | None:
    """Give the record of the same index, or leave the folder ready for a build.

    Raises:
        ConfigError: the folder holds something else.
    """
    folder, journal = request.folder, request.folder / _JOURNAL
    if (folder / RECORD).is_file():
        if not request.overwrite:
            found = read_index(folder)
            if _of_record(found) == asked:
                return found
            raise ConfigError(
                f"{folder}: holds an index of other inputs. Give --overwrite to replace it, or another --to."
            )
        write_bytes(journal, b"{}")  # killed from here on, the folder is one of another build
        (folder / RECORD).unlink()
        _clear(folder)
    elif journal.is_file():
        if json.loads(journal.read_bytes()) != asked:
            if not request.overwrite:
                raise ConfigError(
                    f"{folder}: holds a build of other inputs that was stopped. Give --overwrite to begin anew, "
                    "or another --to."
                )
            _clear(folder)
    elif any(folder.iterdir()):
        raise ConfigError(f"{folder}: is there and is no index, so it is left alone. Give another --to.")
    write_bytes(journal, json.dumps(asked).encode())
    return None


def _of_record(found: IndexRecord) -> dict[str, object]:
    return {
        "format": found.format,
        "manifest": found.manifest_sha256,
        "texts": found.texts.sha256,
        "column": found.texts.column,
        "codec": found.codec,
        "rescoring": found.rescoring,
        "kind": found.kind,
    }


def _clear(folder: Path) -> None:
    """Remove the files of an index, and no others."""
    for name in (*_FILES, _JOURNAL):
        (folder / name).unlink(missing_ok=True)


def _built(
    request: IndexRequest, name: CodecName, fine: str | None, asked: dict[str, object], progress: Progress
) -> IndexRecord:
    """Run every step that is not done yet; the record is written last."""
    folder = request.folder
    count = sum(1 for _ in request.texts)
    fewest = FEWEST_VECTORS if request.manifest.codecs is None else 1  # without statistics they are the sample
    if count < fewest:
        raise ConfigError(f"{request.texts.path}: {count} texts; at least {fewest} are needed. Give more.")
    if name.is_trained and count < FEWEST_SAMPLES:
        raise ConfigError(
            f"codec {name.text}: is trained on at least {FEWEST_SAMPLES} texts, and {request.texts.path} has {count}. "
            "Give more texts, or choose one of int8, int4, rabitq2, rabitq or binary."
        )
    codec, finer = _codecs(request, name, fine, count, progress)
    _encode(request, codec, finer, count, progress)
    codes = code_file.mapped(folder / CODES, codec.size_bytes, count)
    if request.kind == "hnsw":
        approximate.build_hnsw(codec, codes, folder / approximate.FILES["hnsw"], progress)
    elif request.kind == "ivf":
        approximate.save_ivf(approximate.build_ivf(codec, codes, progress), folder / approximate.FILES["ivf"])
    _write_probes(request, count)
    (folder / _SAMPLE).unlink(missing_ok=True)
    record = IndexRecord(
        format=1,
        edgeq=VERSION,
        bundle=str(request.bundle.resolve()),
        manifest_sha256=str(asked["manifest"]),
        space=fingerprint.space(request.manifest),
        form=fingerprint.form(request.manifest),
        dim=request.manifest.source.dim,
        texts=IndexedTexts(
            name=request.texts.path.name, column=request.texts.column, sha256=str(asked["texts"]), count=count
        ),
        codec=codec.name.text,
        codec_sha256=codec.sha256,
        code_bytes=codec.size_bytes,
        rescoring=None if finer is None else finer.name.text,
        rescoring_sha256=None if finer is None else finer.sha256,
        kind=request.kind,
        files=tuple(file_ref(folder / each, folder) for each in _FILES if (folder / each).is_file()),
    )
    write_bytes(folder / RECORD, (record.model_dump_json(indent=2) + "\n").encode())
    (folder / _JOURNAL).unlink()
    return record


def _codecs(
    request: IndexRequest, name: CodecName, fine: str | None, count: int, progress: Progress
) -> tuple[Codec, Codec | None]:
    """Fit the codecs, or read those that a killed run fitted."""
    known = None
    if request.manifest.codecs is not None:
        known = read_statistics(request.bundle / request.manifest.codecs.path)
    names = [name] if fine is None else [name, parse(fine)]
    needs_sample = known is None or any(each.needs_sample for each in names)
    sample: Vectors = np.empty((0, request.manifest.source.dim), np.float32)
    paths = [request.folder / each for each in (CODEC, FINE_CODEC)[: len(names)]]
    if needs_sample and not all(path.is_file() for path in paths):
        wanted = _SAMPLES if any(each.is_trained for each in names) else _SAMPLES // 10
        sample = _sample(request, count, wanted, progress)
    found = [_fitted(path, each, sample, known, request) for path, each in zip(paths, names, strict=True)]
    return found[0], found[1] if len(found) > 1 else None


def _fitted(
    path: Path, name: CodecName, sample: Vectors, known: VectorStatistics | None, request: IndexRequest
) -> Codec:
    """Fit one codec and write it."""
    if not path.is_file():
        origin = f"{len(sample)} of {request.texts.path.name}"
        write_bytes(path, fit_codec(name.text, sample, origin, known).to_bytes())
    return read_codec(path)


def _sample(request: IndexRequest, count: int, wanted: int, progress: Progress) -> Vectors:
    """Embed evenly spaced texts, going on behind what a killed run left."""
    path, dim = request.folder / _SAMPLE, request.manifest.source.dim
    rows = set(evenly_spaced(count, wanted))
    done = code_file.rows_in(path, 4 * dim)
    code_file.cut(path, 4 * dim, done)
    chosen = (text for row, (text, _) in enumerate(request.texts) if row in rows)
    for texts in _steps(islice(chosen, done, None)):
        vectors = request.embed(texts)
        require_vectors(vectors, dim, str(request.texts.path))
        code_file.append(path, vectors.astype("<f4"))
        done += len(texts)
        progress("sample", done, len(rows))
    return np.fromfile(path, "<f4").reshape(-1, dim)


def _encode(request: IndexRequest, codec: Codec, finer: Codec | None, count: int, progress: Progress) -> None:
    """Embed and encode all texts, going on behind what a killed run left."""
    folder = request.folder
    files = [(folder / CODES, codec)] + ([] if finer is None else [(folder / FINE_CODES, finer)])
    done = min(code_file.rows_in(path, each.size_bytes) for path, each in files)
    for path, each in files:
        code_file.cut(path, each.size_bytes, done)
    _write_ids(request)
    dim = request.manifest.source.dim
    known = folder / _SAMPLE  # of few texts it holds all
    embedded = _known(known, dim, done) if code_file.rows_in(known, 4 * dim) == count else _embedded(request, done)
    for vectors in embedded:
        require_vectors(vectors, dim, f"{request.texts.path}, from text {done}")
        for path, each in files:
            code_file.append(path, each.encode_bytes(vectors))
        done += len(vectors)
        progress("encode", done, count)


def _embedded(request: IndexRequest, done: int) -> Iterator[Vectors]:
    """Embed the texts behind the first `done`, a few hundred at a time."""
    for some in _steps(islice((text for text, _ in request.texts), done, None)):
        yield request.embed(some)


def _known(path: Path, dim: int, done: int) -> Iterator[Vectors]:
    """Read vectors behind the first `done`, a few hundred at a time."""
    vectors = np.memmap(path, "<f4", "r").reshape(-1, dim)
    for start in range(done, len(vectors), _STEP):
        yield np.asarray(vectors[start : start + _STEP])


def _write_ids(request: IndexRequest) -> None:
    """Write the ids of a BEIR corpus; the texts of a file are named by their numbers."""
    if request.texts.is_beir and not (request.folder / IDS).is_file():
        with replacing(request.folder / IDS) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(identifier) + "\n" for _, identifier in request.texts)


def _write_probes(request: IndexRequest, count: int) -> None:
    """Keep a few texts with their vectors: what another form of the model is compared on before it searches here."""
    rows = set(evenly_spaced(count, PROBE_TEXTS))
    texts = [text for row, (text, _) in enumerate(request.texts) if row in rows]
    vectors = request.embed(texts)
    write_bytes(request.folder / PROBES, "".join(json.dumps(text) + "\n" for text in texts).encode())
    with replacing(request.folder / PROBE_VECTORS) as partial, partial.open("wb") as file:
        np.save(file, vectors.astype("<f4"), allow_pickle=False)


def _steps(texts: Iterator[str]) -> Iterator[list[str]]:
    """Give texts in lists of up to a few hundred."""
    while some := list(islice(texts, _STEP)):
        yield some


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock a folder, so that two builds do not write the same files.

    Raises:
        ConfigError: another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another process builds this index. Wait for it.") from error
        yield
    finally:
        os.close(handle)
