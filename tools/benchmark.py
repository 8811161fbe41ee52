"""Measure edgeq beside its peers: quality, latency, the cost of exporting and of calibrating. Called by `tools/bench`.

Everything is measured in one run on one machine: each latency in a process of its own, the models taking turns; memory
as the peak of the whole process tree. The peers are what ONNX Runtime's own tools make of the same float model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from edgeq import backends, evaluation, latency, parity
from edgeq.ancestry import float_model
from edgeq.backends.contract import Embeddings, Session, embed_batches
from edgeq.bundle import load_manifest
from edgeq.cache import Cache
from edgeq.corpora import deduplicate, default_texts, read_texts
from edgeq.evaluation.reading import RetrievalSet, StsPairs
from edgeq.machine import describe
from edgeq.reference import FloatSession
from edgeq.texts import Tokenizer, batches

MODEL = "all-MiniLM-L6-v2"
TARGETS = ("x86-64-onnxruntime", "x86-64-avx2-onnxruntime")
TFLITE = {
    "w8a8-int": "android-litert",
    "w8a8-int, tflite-runtime 2.14": "raspberry-pi-tflite-runtime",
    "w8a16-int": "integer-only-w8a16",
}
PARTS = ("quality", "latency", "tflite", "export", "calibration")
SEQUENCES = (16, 32, 128, 256)
ROUNDS, RUNS, WARMUP_RUNS = 3, 60, 15
THREADS = 2
MAX_SEQUENCE = 256
SAMPLES = 512
PEER_TEXTS = 128  # ONNX Runtime's calibrator keeps what it observes: more texts take gigabytes

Figures = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """Name a figure by its path in the results, and the limit it is held to."""

    what: str
    path: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, results: Figures) -> tuple[float, bool] | None:
        """Give the figure and whether it meets the limit; None when that part was not measured."""
        found: Any = results
        for key in self.path:
            if key not in found:
                return None
            found = found[key]
        value = float(found)
        is_met = (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
        return value, is_met


QUALITY = ("quality", "edgeq w8a8-gemm")
GOALS = (
    Goal("cosine mean", (*QUALITY, "cosine_mean"), at_least=0.9985),
    Goal("cosine min", (*QUALITY, "cosine_min"), at_least=0.993),
    Goal("top-10 overlap", (*QUALITY, "top10_overlap"), at_least=0.97),
    Goal("STS Spearman, % of FP32", (*QUALITY, "sts_percent"), at_least=99.8),
    Goal("nDCG@10, % of FP32", (*QUALITY, "ndcg_percent"), at_least=99.7),
    Goal("invariance", (*QUALITY, "invariance"), at_least=0.99999),
    Goal("7 bit: cosine mean", ("quality", "edgeq w8a8-gemm-7bit", "cosine_mean"), at_least=0.9968),
    Goal("w8a8-int: cosine mean", ("quality", "edgeq w8a8-int", "cosine_mean"), at_least=0.998),
    Goal("w8a8-int: cosine min", ("quality", "edgeq w8a8-int", "cosine_min"), at_least=0.99),
    Goal("w8a8-int: STS Spearman, % of FP32", ("quality", "edgeq w8a8-int", "sts_percent"), at_least=99.7),
    Goal("w8a8-int: nDCG@10, % of FP32", ("quality", "edgeq w8a8-int", "ndcg_percent"), at_least=99.7),
    Goal("w8a8-int: between buckets", ("quality", "edgeq w8a8-int", "invariance"), at_least=0.999),
    Goal("w8a8-int: size, MB", ("quality", "edgeq w8a8-int", "size_mb"), at_most=24.0),
    Goal(
        "tflite-runtime form: size, MB",
        ("quality", "edgeq w8a8-int, tflite-runtime 2.14", "size_mb"),
        at_most=25.0,
    ),
    Goal("w8a16-int: cosine mean", ("quality", "edgeq w8a16-int", "cosine_mean"), at_least=0.999),
    Goal("w8a16-int: cosine min", ("quality", "edgeq w8a16-int", "cosine_min"), at_least=0.995),
    Goal("latency at 128 tokens, of FP32", ("latency", "128", "edgeq_of_float32"), at_most=0.55),
    Goal("latency at 128 tokens, of ORT dynamic", ("latency", "128", "edgeq_of_dynamic"), at_most=1.0),
    Goal("size, MB", (*QUALITY, "size_mb"), at_most=24.0),
    Goal("export of 512 texts, s", ("export", "first_s"), at_most=45.0),
    Goal("export of 512 texts, peak GB", ("export", "first_peak_gb"), at_most=1.5),
    Goal("second target of the same scheme, s", ("export", "second_s"), at_most=10.0),
    Goal("calibration memory, 2,048 texts over 128", ("calibration", "ratio"), at_most=1.05),
)


@dataclass(frozen=True)
class Bundles:
    """Hold where the models lie that are compared."""

    folder: Path
    float_model: Path
    dynamic: Path
    static: Path

    @property
    def tokenizer(self) -> Tokenizer:
        """Give the model's tokenizer."""
        return Tokenizer.from_file(self.folder / TARGETS[0] / "tokenizer.json", MAX_SEQUENCE)


def run_measured(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; give its seconds and the peak memory of its process tree in GB (proportional set size)."""
    began = time.perf_counter()
    child = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, sum(map(_memory, [child, *_children(child)])))
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {child.returncode}")
    return time.perf_counter() - began, peak / 1e9


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def command(folder: Path, *targets: str) -> list[str]:
    """Give the command line of an export."""
    words = [sys.executable, "-m", "edgeq", "export", MODEL, "--out", str(folder), "--quiet"]
    return [*words, *(word for target in targets for word in ("--target", target))]


def export(folder: Path) -> Figures:
    """Export one target with 512 texts from an empty cache, then a second of the same scheme."""
    fewer = ["--samples", str(SAMPLES)]
    first_s, first_peak = run_measured([*command(folder, TARGETS[0]), *fewer])
    second_s, second_peak = run_measured([*command(folder, "arm64-onnxruntime"), *fewer])
    return {"first_s": first_s, "first_peak_gb": first_peak, "second_s": second_s, "second_peak_gb": second_peak}


def make_peers(folder: Path, float_model: Path, tokenizer: Tokenizer) -> tuple[Path, Path]:
    """Let ONNX Runtime's own tools quantise the float model: dynamically, and statically with their defaults."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Feed one text at a time."""

        def __init__(self) -> None:
            ids = tokenizer.encode(read_texts(default_texts()[0])[:PEER_TEXTS]).ids
            width = max(map(len, ids))  # one length: it refuses ranges of different shapes
            padded = [np.array([[*row, *[0] * (width - len(row))]], np.int64) for row in ids]
            self._feeds = iter([{"input_ids": row, "attention_mask": (row > 0).astype(np.int64)} for row in padded])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    dynamic, static = folder / "ort-dynamic.onnx", folder / "ort-static.onnx"
    quantization.quantize_dynamic(str(float_model), str(dynamic), per_channel=True)
    quantization.quantize_static(str(float_model), str(static), Reader(), per_channel=True)
    return dynamic, static


def quality(bundles: Bundles, data: Path, limit: int | None) -> Figures:
    """Compare every model's vectors with FP32's on the evaluation texts, on STS and on retrieval."""
    tokenizer = bundles.tokenizer
    pairs = evaluation.load_sts(data / "sts_dev.jsonl")
    beir = evaluation.load_beir(data / "squad11dev")
    texts = deduplicate([*beir.documents, *beir.queries, *pairs.first, *pairs.second])[:limit]
    reference = Vectors(bundles.float_model, tokenizer)
    expected = reference(texts, None)
    models: dict[str, Path] = {
        "edgeq w8a8-gemm": bundles.folder / TARGETS[0],
        "edgeq w8a8-gemm-7bit": bundles.folder / TARGETS[1],
        **{f"edgeq {name}": bundles.folder / target for name, target in TFLITE.items()},
        "ORT dynamic": bundles.dynamic,
        "ORT static": bundles.static,
    }
    figures = {}
    for name, path in models.items():
        vectors = Vectors(path, tokenizer)
        tokens = tokenizer.encode(texts[:: max(1, len(texts) // 200)])
        measures = parity.measure(
            expected, vectors(texts, None), texts,
            parity.invariance(vectors.session, tokens, MAX_SEQUENCE, vectors.buckets),
        )  # fmt: skip
        files = [path] if path.is_file() else [path / ref.path for ref in load_manifest(path).artifact.files]
        figures[name] = {
            "cosine_mean": measures.cosine_mean,
            "cosine_min": measures.cosine_min,
            "top10_overlap": measures.top10_overlap,
            "invariance": measures.invariance_min,
            "worst_text": measures.worst_text,
            "size_mb": sum(file.stat().st_size for file in files) / 1e6,
        }
        if limit is None:
            figures[name] |= _tasks(pairs, beir, reference, vectors)
    return {"texts": len(texts), **figures}


def _tasks(pairs: StsPairs, beir: RetrievalSet, reference: Vectors, vectors: Vectors) -> Figures:
    sts = evaluation.evaluate_sts(pairs, reference, vectors).spearman
    ndcg = evaluation.evaluate_retrieval(beir, {}, reference, vectors).ndcg_at_10
    return {"sts_percent": sts.retention_percent, "ndcg_percent": ndcg.retention_percent}


class Vectors:
    """Embed texts with a bundle or an ONNX file; what was embedded once is kept."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        """Load the model."""
        self.buckets: tuple[int, ...] = ()
        if path.is_dir():
            manifest = load_manifest(path)
            backend = backends.find(manifest.artifact.backend, str(path))
            self.session: Session = backend.load(manifest.artifact, path, manifest.target, THREADS)
            self.buckets = manifest.target.buckets_tokens
        else:
            self.session = FloatSession.of(path, threads=THREADS)
        self._tokenizer = tokenizer
        self._kept: dict[str, Embeddings] = {}

    def __call__(self, texts: Sequence[str], prompt: str | None) -> Embeddings:
        """Give float32[texts, dim]."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if new:
            vectors = embed_batches(self.session, batches(self._tokenizer.encode(new)), len(new))
            self._kept |= dict(zip(new, vectors, strict=True))
        return np.stack([self._kept[text] for text in texts])


def latencies(bundles: Bundles, sequences: Sequence[int]) -> Figures:
    """Time each model at batch 1, each run of it in a process of its own, the models taking turns."""
    models = {
        "float32": bundles.float_model,
        "edgeq": bundles.folder / TARGETS[0],
        "dynamic": bundles.dynamic,
        "static": bundles.static,
    }
    figures = {}
    for sequence in sequences:
        found = _medians(models, sequence, THREADS)
        figures[str(sequence)] = {
            **found,
            "edgeq_of_float32": found["edgeq_ms"] / found["float32_ms"],
            "edgeq_of_dynamic": found["edgeq_ms"] / found["dynamic_ms"],
        }
    return figures


def tflite_latencies(bundles: Bundles, sequences: Sequence[int]) -> Figures:
    """Time the TFLite artifacts, and FP32 in ONNX Runtime, each on one thread."""
    models = {"float32": bundles.float_model, **{name: bundles.folder / target for name, target in TFLITE.items()}}
    return {str(sequence): _medians(models, sequence, 1) for sequence in sequences}


def _medians(models: Mapping[str, Path], sequence: int, threads: int) -> dict[str, float]:
    medians: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, path in models.items():
            job = latency.Job(
                model=str(path), threads=threads, batch=1, sequence=sequence, vocabulary=30000,
                num_runs=RUNS, warmup_runs=WARMUP_RUNS,
            )  # fmt: skip
            medians[name].append(float(np.median(latency.in_process(job).latencies_ms)))
    return {f"{name}_ms": float(np.median(values)) for name, values in medians.items()}


def calibration(bundles: Bundles, data: Path, folder: Path) -> Figures:
    """Calibrate on 128 and on 2,048 texts, each in a process of its own, and compare the peaks of their memory."""
    with gzip.open(data / "calib_20k.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = deduplicate([json.loads(line)["text"] for line in file])
    longest = sorted(texts, key=len)[-64:]  # in both: the longest text alone decides the largest batch
    others = np.random.default_rng(0).permutation(sorted(set(texts) - set(longest))).tolist()
    figures: Figures = {}
    for count in (128, 2048):
        path = folder / f"calibration-{count}.json"
        path.write_text(json.dumps([*longest, *others][:count]), encoding="utf-8")
        tokenizer = bundles.folder / TARGETS[0] / "tokenizer.json"
        program = (
            "import json, sys; import onnx; from pathlib import Path; from edgeq import calibrate; "
            "from edgeq.texts import Tokenizer; from edgeq.latency import peak_memory_bytes; "
            "tokens = Tokenizer.from_file(Path(sys.argv[2]), 256).encode(json.loads(Path(sys.argv[3]).read_text())); "
            "calibrate.calibrate(onnx.load(sys.argv[1]), tokens, 0, lambda *_: None); print(peak_memory_bytes())"
        )
        words = [sys.executable, "-c", program, str(bundles.float_model), str(tokenizer), str(path)]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        figures[f"{count}_texts_gb"] = int(output.split()[-1]) / 1e9
    return {**figures, "ratio": figures["2048_texts_gb"] / figures["128_texts_gb"]}


def judged(results: Figures) -> list[tuple[str, str, str, str]]:
    """Give a row for each goal: what, the figure, its limit, and whether it is met."""
    rows = []
    for goal in GOALS:
        limit = f">= {goal.at_least:g}" if goal.at_least is not None else f"<= {goal.at_most:g}"
        found = goal.judge(results)
        rows.append((goal.what, "-", limit, "not measured") if found is None
                    else (goal.what, f"{found[0]:.5g}", limit, "met" if found[1] else "MISSED"))  # fmt: skip
    return rows


def markdown(results: Figures) -> str:
    """Write every part as a table."""
    parts = [f"Measured on {results['machine']}, {results['date']}."]
    parts.append(_table(("goal", "measured", "limit", "result"), judged(results)))
    if "quality" in results:
        models = {name: found for name, found in results["quality"].items() if isinstance(found, dict)}
        columns = ("cosine_mean", "cosine_min", "top10_overlap", "sts_percent", "ndcg_percent", "invariance", "size_mb")
        rows = [(name, *(_number(found.get(column)) for column in columns)) for name, found in models.items()]
        parts += [f"Quality on {results['quality']['texts']} texts:", _table(("model", *columns), rows)]
    for part, threads in (("latency", f"{THREADS} threads"), ("tflite", "1 thread")):
        if part in results:
            columns = tuple(next(iter(results[part].values())))
            rows = [(tokens, *(_number(found[key]) for key in columns)) for tokens, found in results[part].items()]
            parts += [f"Median latency at batch 1, {threads}:", _table(("tokens", *columns), rows)]
    for part in ("export", "calibration"):
        if part in results:
            rows = [(name, _number(value)) for name, value in results[part].items()]
            parts += [f"{part.capitalize()}:", _table(("figure", "value"), rows)]
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Measure what is asked for; exit 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="sts_dev.jsonl, squad11dev/, calib_20k.jsonl.gz")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; repeatable")
    parser.add_argument("--limit", type=int, help="compare quality on so many texts only, without STS and retrieval")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    wanted = options.only or PARTS
    results: Figures = {"machine": describe(), "date": time.strftime("%Y-%m-%d")}

    def measure(part: str, how: Callable[[], Figures]) -> None:
        if part in wanted:
            sys.stderr.write(f"{part}\n")
            results[part] = how()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["EDGEQ_CACHE_DIR"] = str(folder / "cache")
        measure("export", lambda: export(folder / "timed"))
        run_measured(
            command(folder, *TARGETS, *TFLITE.values())
        )  # what is compared is what a user gets who asks for nothing special
        bundles = _bundles(folder)
        measure("quality", lambda: quality(bundles, options.data, options.limit))
        measure("latency", lambda: latencies(bundles, SEQUENCES))
        measure("tflite", lambda: tflite_latencies(bundles, SEQUENCES))
        measure("calibration", lambda: calibration(bundles, options.data, folder))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")
    sys.stdout.write(markdown(results))
    return int(any(row[3] == "MISSED" for row in judged(results)))


def _bundles(folder: Path) -> Bundles:
    manifest = load_manifest(folder / TARGETS[0])
    path = float_model(manifest, None, Cache().root)
    tokenizer = Tokenizer.from_file(folder / TARGETS[0] / "tokenizer.json", MAX_SEQUENCE)
    return Bundles(folder, path, *make_peers(folder, path, tokenizer))


if __name__ == "__main__":
    sys.exit(main())
