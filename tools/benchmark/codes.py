"""Measure codes of the vectors: recall against FP32's exact search, the cost of encoding, and a million vectors."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmark.figures import Blank, Figures
from benchmark.making import Workshop, note
from benchmark.processes import last_line
from benchmark.rows import GEMM, OWN
from benchmark.samples import FILES, load, thinned
from edgeq.bundle.load import load as load_bundle
from edgeq.bundle.manifest import load_manifest
from edgeq.codecs.fit import codec_from_statistics, require_faiss
from edgeq.codecs.statistics import VectorStatistics, read_statistics
from edgeq.data.splits import deduplicate
from edgeq.errors import ConfigError
from edgeq.evaluation.tasks import Embed
from edgeq.pipeline.validate import embedders
from edgeq.vectors.measure import CodeFigures, Side, cross, measure, normalised, truth

CODECS = (
    "float32", "float16", "int8", "int8-vector", "int4", "int2", "ternary", "rabitq4", "rabitq2", "rabitq", "binary",
    "binary-itq", "pca128+float32", "pca128+int4", "pca256+rabitq2", "first128+float32", "pq48", "opq48", "pq32",
    "pq16",
)  # fmt: skip
BOTH_INT8 = "int8, both sides"
OF_INTEGER_MODEL = ("float32", "int8", "int4", "rabitq", "binary")
_STEP, _TIMED_TEXTS, _MILLION_ROUNDS = 2000, 256, 3

Vectors = NDArray[np.float32]


def compare(workshop: Workshop, data: Path, every: int) -> Figures:
    """Measure codes of FP32's and of the integer model's vectors, on paragraphs among distractors."""
    bundle = workshop.own([row for row in OWN if row.name == GEMM])[GEMM].path
    if bundle is None:
        return {"rows": Blank(f"{GEMM} could not be made")}
    retrieval = thinned(load(data), every).retrieval
    with gzip.open(data / FILES[2], "rt", encoding="utf-8") as file:
        distractors = deduplicate([json.loads(line)["text"] for line in file])[::every]
    documents = (*retrieval.documents, *distractors)
    known = read_statistics(bundle / "codecs.npz")
    sides = []
    for name, embed in zip(("FP32", GEMM), embedders(bundle, workshop.float_model()), strict=True):
        folder = workshop.folder / "vectors" / f"{name.split()[-1]}-{every}"
        sides.append(
            Side(
                name,
                normalised(_embedded(embed, documents, "encode_document", folder / "documents")),
                normalised(_embedded(embed, retrieval.queries, "encode_query", folder / "queries")),
            )
        )
    ideal = truth(sides[0], retrieval.qrels)
    rows: dict[str, Figures] = {}
    plan: tuple[tuple[Sequence[Side], Sequence[str]], ...] = (
        (sides[:1], CODECS), ((sides[1], cross(sides[1], sides[0])), OF_INTEGER_MODEL),
    )  # fmt: skip
    for some, codecs in plan:
        for codec in codecs:
            note(f"codes: {codec}")
            for side in some:
                rows |= _rows(lambda side=side, codec=codec: measure(ideal, [side], [codec], ["exact"], known))
    rows[f"FP32: {BOTH_INT8}"] = _both_int8(sides[0], ideal.nearest, known)
    lost = rows[f"{GEMM}: float32"]["recall_at_10"] - rows[f"{GEMM}: int8"]["recall_at_10"]
    encoding = _encoding(bundle, documents)
    return {"rows": rows, "lost_by_int8_of_the_integer_model": lost, "encoding": encoding,
            "encoding_most": max(encoding.values())}  # fmt: skip


def _rows(how: Callable[[], Sequence[CodeFigures]]) -> dict[str, Figures]:
    """Give the figures as plain data by model and codec; nothing for a codec that the set is too small for."""
    try:
        return {f"{each.model}: {each.codec}": each.model_dump(mode="json") for each in how()}
    except ConfigError as error:
        note(str(error))
        return {}


def _both_int8(side: Side, nearest: NDArray[np.int64], known: VectorStatistics) -> Figures:
    """Measure int8 queries against int8 documents, as a device without floats searches."""
    codec = codec_from_statistics("int8", known)
    documents, queries = (codec.decode(codec.encode_bytes(rows)) for rows in (side.documents, side.queries))
    shared = []
    for start in range(0, len(queries), 256):
        found = np.argsort(-(queries[start : start + 256] @ documents.T), axis=1, kind="stable")[:, :10]
        wanted = nearest[start : start + 256, :10]
        shared += [len(set(one) & set(two)) / 10 for one, two in zip(found.tolist(), wanted.tolist(), strict=True)]
    return {"model": side.name, "codec": BOTH_INT8, "recall_at_10": float(np.mean(shared))}


def _encoding(bundle: Path, documents: Sequence[str]) -> Figures:
    """Time encoding with and without codes, in turns, and give the ratio of the medians of a codec each."""
    loaded = load_bundle(bundle, threads=1)
    if load_manifest(bundle).codecs is None:
        return {}
    some = list(documents[-_TIMED_TEXTS:])
    ratios: Figures = {}
    for codec in ("int8", "binary", "rabitq", "rabitq2", "int4"):
        seconds: dict[str, list[float]] = {"plain": [], "coded": []}
        for _ in range(5):
            for name, given in (("plain", None), ("coded", codec)):
                began = time.perf_counter()
                loaded.encode_document(some, codec=given)
                seconds[name].append(time.perf_counter() - began)
        ratios[codec] = float(np.median(np.array(seconds["coded"]) / np.array(seconds["plain"])))
    return ratios


def _embedded(embed: Embed, texts: Sequence[str], method: str, path: Path) -> Vectors:
    """Embed texts a part at a time; what an earlier run wrote is used again."""
    path.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(texts), _STEP):
        part = path / f"{start}.npy"
        if not part.is_file():
            note(f"embedding {path.parent.name}, {path.name} from {start}")
            np.save(part, embed(texts[start : start + _STEP], method))  # type: ignore[arg-type]
        parts.append(np.load(part))
    return np.concatenate(parts)


_HNSW = """
import sys
from pathlib import Path
import numpy as np, psutil
from edgeq.codecs.codec import read_codec
from edgeq.vectors import approximate, code_file
codec, count = read_codec(Path(sys.argv[1])), int(sys.argv[3])
codes = code_file.mapped(Path(sys.argv[2]), codec.size_bytes, count)
approximate.build_hnsw(codec, codes, Path(sys.argv[4]), lambda *_: None)
"""


def million(workshop: Workshop, data: Path, count: int = 1_000_000) -> Figures:
    """Scan a million codes of a bit a dimension beside FAISS's RaBitQfs, and build an int8 HNSW index of as many.

    The vectors are sums of two of the model's own and noise: there are no million texts here. One thread.
    """
    from benchmark.processes import measured
    from edgeq.vectors.scan import FaissScan, rescored

    faiss = require_faiss("tools/bench")
    faiss.omp_set_num_threads(1)
    known = read_statistics(workshop.folder / "bundles" / OWN[0].target / "codecs.npz")
    parts = sorted((workshop.folder / "vectors").rglob("documents/*.npy"))
    base = normalised(np.concatenate([np.load(part) for part in parts if part.parts[-3].startswith("FP32")]))
    queries = base[:: max(1, len(base) // 60)][:60]
    binary, int8 = (codec_from_statistics(name, known) for name in ("binary", "int8"))
    folder = workshop.folder / "million"
    folder.mkdir(exist_ok=True)
    rival = faiss.index_factory(base.shape[1], "RaBitQfs", faiss.METRIC_INNER_PRODUCT)
    bits, fine, best = [], [], np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, count, 50_000):
        block = _mixed(base, start, min(50_000, count - start))
        bits.append(binary.encode_bytes(block))
        fine.append(int8.encode_bytes(block))
        if start == 0:
            rival.train(block)
        rival.add(block)
        scores = queries @ block.T
        chosen = np.argsort(-scores, axis=1)[:, :10]
        best = np.hstack([best, np.take_along_axis(scores, chosen, axis=1)])
        rows = np.hstack([rows, chosen + start])
    order = np.argsort(-best, axis=1)[:, :10]
    truth_rows = np.take_along_axis(rows, order, axis=1)
    codes, finer = np.concatenate(bits), np.concatenate(fine)
    scan = FaissScan(faiss, binary, codes)
    runs: dict[str, Callable[[Vectors], NDArray[np.int64]]] = {
        "edgeq binary, 100 candidates by int8": lambda each: rescored(int8, finer, each, scan.nearest(each, 100), 10),
        "edgeq binary, 300 candidates by int8": lambda each: rescored(int8, finer, each, scan.nearest(each, 300), 10),
        "FAISS RaBitQfs": lambda each: rival.search(each, 10)[1],
        "FAISS RaBitQfs, 100 candidates by int8": lambda each: rescored(
            int8, finer, each, rival.search(each, 100)[1], 10
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_MILLION_ROUNDS):
        for name, run in runs.items():
            run(queries[:1])
            began = time.perf_counter()
            for row in range(len(queries)):
                run(queries[row : row + 1])
            times[name].append((time.perf_counter() - began) / len(queries) * 1000)
    figures: Figures = {"vectors": count, "dimensions": int(base.shape[1])}
    for name, run in runs.items():
        shared = [len(set(a) & set(b)) / 10 for a, b in zip(run(queries).tolist(), truth_rows.tolist(), strict=True)]
        figures[f"{name}: recall@10"] = float(np.mean(shared))
        figures[f"{name}: ms a query"] = float(np.median(times[name]))
    first, rival_name = list(runs)[0], list(runs)[2]
    figures["edgeq over RaBitQfs"] = float(np.median(np.array(times[first]) / np.array(times[rival_name])))
    (folder / "codec.npz").write_bytes(int8.to_bytes())
    (folder / "codes.bin").write_bytes(finer.tobytes())
    note("million: HNSW")
    words = [sys.executable, "-c", _HNSW, folder / "codec.npz", folder / "codes.bin", str(count), folder / "hnsw.faiss"]
    ran = measured(words, folder / "log")
    blank = Blank(last_line(ran.log)) if ran.exit_code else None
    figures["HNSW of int8: peak GB"] = blank or ran.peak_gb
    figures["HNSW of int8: seconds"] = blank or ran.seconds
    if blank is None:
        figures["HNSW of int8: file, MB"] = (folder / "hnsw.faiss").stat().st_size / 1e6
    shutil.rmtree(folder)
    return figures


def _mixed(base: Vectors, seed: int, count: int) -> Vectors:
    """Make vectors that lie as the model's do: sums of two of its own and noise."""
    random = np.random.default_rng(seed)
    first, second = (base[random.integers(len(base), size=count)] for _ in range(2))
    noise = random.standard_normal(first.shape, dtype=np.float32)
    return normalised(first + np.float32(0.6) * second + np.float32(0.6 / base.shape[1] ** 0.5) * noise)
