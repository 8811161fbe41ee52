"""Measure latency and peak memory of a bundle's artifact beside FP32, for each shape and number of threads.

Each measurement is a child process (`edgeq.bundle.benchmark_child`): two runtimes in one process compete for the cores
with spinning threads, and an earlier shape's memory would count into the peak.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np

from edgeq.bundle.benchmark_child import Job, Sample
from edgeq.errors import ConfigError, EdgeqError, TimedOut, error_of
from edgeq.records import Manifest, Record, RunKind
from edgeq.system.progress import Progress

_CELL_LIMIT_S = 900.0


class Latency(Record):
    """Give percentiles of the time of one run, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


class Cell(Record):
    """Hold one model's figures at one shape and number of threads; `latency` is None unless it ran on the device."""

    model: Literal["artifact", "float32"]
    threads: int
    batch: int
    sequence: int
    num_runs: int
    latency: Latency | None
    speedup: float | None  # median of FP32 over median of the artifact
    peak_memory_bytes: int


class Benchmark(Record):
    """Hold every cell of one bundle, with the kind of run and the machine."""

    target: str
    ran_on: RunKind
    machine: str
    artifact_bytes: int
    float_bytes: int | None
    cells: tuple[Cell, ...]


class Shapes(Record):
    """Hold the shapes and numbers of threads to measure, and how often to run each."""

    sequences: tuple[int, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    num_runs: int
    warmup_runs: int


def measure(bundle: Path, shapes: Shapes, against: Path | None, progress: Progress) -> Benchmark:
    """Measure a bundle's artifact, and FP32 beside it, at every shape and number of threads.

    Args:
        bundle: OUT/TARGET, as `edgeq export` wrote it.
        shapes: to measure.
        against: the float model's ONNX file; None measures the artifact alone.
        progress: called as `progress(stage, done, total)`.

    Raises:
        ConfigError: the model cannot take a shape, or `against` is no file.
        EdgeqError: loading the bundle fails in the child process; the error has the child's exit code.
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
    """Give the percentiles shown to the user; each is a measured run, never interpolated below one."""
    p50, p90, p99 = (float(np.percentile(latencies_ms, q, method="higher")) for q in (50, 90, 99))
    return Latency(p50_ms=p50, p90_ms=p90, p99_ms=p99)


def _check(shapes: Shapes, target: str, max_sequence: int, against: Path | None, takes_images: bool) -> None:
    """Refuse shapes that the model cannot take, and a float model that does not exist."""
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
    """Make the cells of one shape from the artifact's and FP32's samples."""
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
    """Run one job in a child process, and read its sample.

    Raises:
        TimedOut: the child did not end in time.
        EdgeqError: the child failed.
    """
    command = [sys.executable, "-m", "edgeq.bundle.benchmark_child", job.model_dump_json()]
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
    """Turn a child's exit code and stderr into the error that it raised."""
    kind = error_of(exit_code)
    if kind is not None and kind is not EdgeqError:
        return kind(log)
    return EdgeqError(
        f"{job.model}: measuring batch {job.batch} x {job.sequence} tokens died with status {exit_code}: {log[-2000:]}"
    )
