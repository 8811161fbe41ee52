"""Measure latency and peak memory of a bundle, beside FP32, each cell in a process of its own.

Two runtimes in one process fight over the cores with spinning threads, and a shape that ran before leaves its memory
behind: hence `python -m edgeq.bundle.benchmark` for every model, shape and number of threads.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeq.errors import ConfigError, EdgeqError, TimedOut, error_of
from edgeq.records import Manifest, Place, Record
from edgeq.system.progress import Progress

if TYPE_CHECKING:
    from edgeq.data.batches import AnyFeeds
    from edgeq.data.sessions import Embeddings, Session


_CELL_LIMIT_S = 900.0


class Job(Record):
    """Tell a child process what to load and what to run."""

    model: str  # a bundle, or a float ONNX file
    threads: int
    batch: int
    sequence: int
    vocabulary: int
    pixels: tuple[int, int] | None = None  # height and width of images, which have no tokens
    num_runs: int
    warmup_runs: int


class Sample(Record):
    """Hold what a child process measured."""

    latencies_ms: tuple[float, ...]
    peak_memory_bytes: int


class Latency(Record):
    """Give percentiles of the time of one run, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


class Cell(Record):
    """Describe one model at one shape and number of threads; `latency` is there only when it ran on the device."""

    model: Literal["artifact", "float32"]
    threads: int
    batch: int
    sequence: int
    num_runs: int
    latency: Latency | None
    speedup: float | None  # median of FP32 over median of the artifact
    peak_memory_bytes: int


class Benchmark(Record):
    """Hold every cell of one bundle, and where they ran."""

    target: str
    ran_on: Place
    machine: str
    artifact_bytes: int
    float_bytes: int | None
    cells: tuple[Cell, ...]


class Shapes(Record):
    """Say which cells to measure and how often to run each."""

    sequences: tuple[int, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    num_runs: int
    warmup_runs: int


def measure(bundle: Path, shapes: Shapes, against: Path | None, progress: Progress) -> Benchmark:
    """Measure a bundle's artifact, and FP32 beside it, at every shape and number of threads.

    Args:
        bundle: what `edgeq export` wrote.
        shapes: the cells.
        against: the float model's ONNX file; None measures the artifact alone.
        progress: called as `progress(stage, done, total)`.

    Raises:
        ConfigError: a shape the model cannot take, or no float model where one is named.
        EdgeqError: whatever loading the bundle raises in the child process, with the same exit code.
    """
    from edgeq.bundle.manifest import load_manifest
    from edgeq.data.tokens import token_limit
    from edgeq.system.host import describe, run_kind

    manifest = load_manifest(bundle)
    limit = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)
    pixels = _pixels(manifest, bundle)
    _check(shapes, manifest.artifact.target, limit, against, pixels is not None)
    vocabulary = 1 if pixels is not None else _vocabulary(bundle)
    ran_on = run_kind(manifest.target.runs_on)
    grid = [(t, b, s) for t in shapes.threads for b in shapes.batches for s in shapes.sequences]
    cells: list[Cell] = []
    for done, (threads, batch, sequence) in enumerate(grid):
        progress("measure", done, len(grid))
        jobs = [
            Job(model=str(model), threads=threads, batch=batch, sequence=sequence, vocabulary=vocabulary, pixels=pixels,
                num_runs=shapes.num_runs, warmup_runs=shapes.warmup_runs)
            for model in (bundle, against) if model is not None
        ]  # fmt: skip
        cells.extend(_cells(jobs, [in_process(job) for job in jobs], is_device=ran_on == "device"))
    progress("measure", len(grid), len(grid))
    return Benchmark(
        target=manifest.artifact.target,
        ran_on=ran_on,
        machine=describe(),
        artifact_bytes=sum(file.size_bytes for file in manifest.artifact.files),
        float_bytes=None if against is None else against.stat().st_size,
        cells=tuple(cells),
    )


def _pixels(manifest: Manifest, bundle: Path) -> tuple[int, int] | None:
    """Give height and width of the images that a bundle takes; None where it takes texts."""
    from edgeq.data.batches import PIXELS

    if manifest.float_model.inputs != (PIXELS,):
        return None
    from edgeq.data import image_preprocessing

    how = image_preprocessing.read(bundle / image_preprocessing.CONFIG)
    return how.height, how.width


def _vocabulary(bundle: Path) -> int:
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(bundle / "tokenizer.json")).get_vocab_size())


def percentiles(latencies_ms: tuple[float, ...]) -> Latency:
    """Give the percentiles shown to the user; the higher ones never interpolate below a measured run."""
    p50, p90, p99 = (float(np.percentile(latencies_ms, q, method="higher")) for q in (50, 90, 99))
    return Latency(p50_ms=p50, p90_ms=p90, p99_ms=p99)


def _check(shapes: Shapes, target: str, max_sequence: int, against: Path | None, takes_images: bool) -> None:
    """Refuse shapes the model cannot take and a float model that is not there."""
    longest = max(shapes.sequences)
    if longest > max_sequence and takes_images:
        raise ConfigError(f"--sequence: {longest} tokens, but the model of {target} takes images. Leave it out.")
    if longest > max_sequence:
        raise ConfigError(
            f"--sequence: {longest} tokens, but the model of {target} takes at most {max_sequence}. "
            "Leave out what is longer."
        )
    if against is not None and not against.is_file():
        raise ConfigError(f"{against}: no such file; --against takes the float model's ONNX file. Check the path.")


def _cells(jobs: list[Job], samples: list[Sample], is_device: bool) -> list[Cell]:
    """Put the artifact's and FP32's samples of one shape side by side."""
    latencies = [percentiles(sample.latencies_ms) for sample in samples]
    speedup = latencies[1].p50_ms / latencies[0].p50_ms if is_device and len(samples) == 2 else None
    names: tuple[Literal["artifact", "float32"], ...] = ("artifact", "float32")
    return [
        Cell(
            model=name,
            threads=job.threads,
            batch=job.batch,
            sequence=job.sequence,
            num_runs=job.num_runs,
            latency=latency if is_device else None,
            speedup=speedup if name == "artifact" else None,
            peak_memory_bytes=sample.peak_memory_bytes,
        )
        for name, job, sample, latency in zip(names, jobs, samples, latencies, strict=False)
    ]


def in_process(job: Job) -> Sample:
    """Run one job in a child process and read what it measured."""
    command = [sys.executable, "-m", "edgeq.bundle.benchmark", job.model_dump_json()]
    try:
        child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CELL_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise TimedOut(
            f"{job.model}: batch {job.batch} x {job.sequence} tokens took over {_CELL_LIMIT_S:.0f} s. "
            "Ask for fewer runs (--num_runs) or smaller shapes."
        ) from error
    if child.returncode:
        raise _error_of(child.returncode, child.stderr.strip(), job)
    return Sample.model_validate_json(child.stdout.splitlines()[-1])


def _error_of(exit_code: int, log: str, job: Job) -> EdgeqError:
    """Turn a child's failure into the error that it met."""
    kind = error_of(exit_code)
    if kind is not None and kind is not EdgeqError:
        return kind(log)
    return EdgeqError(
        f"{job.model}: measuring batch {job.batch} x {job.sequence} tokens died with status {exit_code}: {log[-2000:]}"
    )


def _session(job: Job) -> Session:
    """Load a bundle's artifact, or a float model."""
    path = Path(job.model)
    if path.is_file():
        return _float_session(job)
    from edgeq.backends.registry import find
    from edgeq.bundle.manifest import load_manifest

    manifest = load_manifest(path)
    backend = find(manifest.artifact.backend, job.model)
    return backend.load(manifest.artifact, path, manifest.target, threads=job.threads)


def _float_session(job: Job) -> Session:
    """Load a float model with ONNX Runtime's own defaults: what a user gets who does nothing about it."""
    import onnxruntime as ort

    from edgeq.graph.read import read_onnx

    read_onnx(Path(job.model))
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = ort.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])
    inputs = [port.name for port in session.get_inputs()]
    outputs = [port.name for port in session.get_outputs()]
    if "sentence_embedding" not in outputs:
        raise ConfigError(
            f"{job.model}: outputs are {', '.join(outputs)}; sentence_embedding is needed. "
            "Give --against the float model that edgeq exported."
        )

    def embed(feeds: AnyFeeds) -> Embeddings:
        embeddings: Embeddings = session.run(["sentence_embedding"], feeds.named(inputs))[0]
        return embeddings

    return embed


def _feeds(job: Job) -> AnyFeeds:
    """Make a batch of any tokens, or of any pixels."""
    from edgeq.data.batches import PixelFeeds
    from edgeq.data.tokens import Feeds

    rng = np.random.default_rng(0)
    if job.pixels is not None:
        return PixelFeeds(rng.standard_normal((job.batch, 3, *job.pixels), np.float32))
    ids = rng.integers(0, job.vocabulary, (job.batch, job.sequence), np.int64)
    return Feeds(input_ids=ids, attention_mask=np.ones_like(ids))


def _run(job: Job) -> Sample:
    """Load, warm up, and time every run."""
    from edgeq.backends.contract import TimesItself

    feeds = _feeds(job)
    session = _session(job)
    if isinstance(session, TimesItself):
        latencies_ms = tuple(session.milliseconds(feeds, job.num_runs, job.warmup_runs))
        return Sample(latencies_ms=latencies_ms, peak_memory_bytes=session.peak_memory_bytes())
    for _ in range(job.warmup_runs):
        session(feeds)
    latencies: list[float] = []
    for _ in range(job.num_runs):
        begin = time.perf_counter_ns()
        session(feeds)
        latencies.append((time.perf_counter_ns() - begin) / 1e6)
    return Sample(latencies_ms=tuple(latencies), peak_memory_bytes=peak_memory_bytes())


def peak_memory_bytes() -> int:
    """Give this process's peak resident memory.

    Not `getrusage`: its maximum survives exec, so that a child reports its parent's peak.

    Source: Linux, Documentation/filesystems/proc.rst, table 1-2, VmHWM.

    Raises:
        EdgeqError: the kernel does not say.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found is None:
        raise EdgeqError("/proc/self/status: no VmHWM, which peak memory is read from. Run `edgeq bench` on Linux.")
    return int(found[1]) * 1024


def _main() -> int:
    """Run the job given as JSON and write the sample as JSON."""
    try:
        sample = _run(Job.model_validate_json(sys.argv[1]))
    except EdgeqError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(sample.model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
