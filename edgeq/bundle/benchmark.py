"""Measure latency and peak memory of a bundle's artifact beside FP32, for each shape and number of threads.

Both stay loaded, each in a process of its own, and take turns (`edgeq.bundle.turns`). Every shape has new processes: an
earlier shape's memory would count into the peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgeq.bundle import turns
from edgeq.bundle.benchmark_child import Job
from edgeq.bundle.turns import Latency, Ratio, Timed
from edgeq.errors import ConfigError
from edgeq.records import Manifest, Record, RunKind
from edgeq.system.progress import Progress

_Model = Literal["artifact", "float32"]
ARTIFACT: Literal["artifact"] = "artifact"
FLOAT: Literal["float32"] = "float32"


class Cell(Record):
    """Hold one model's figures at one shape and number of threads; `latency` is None unless it ran on the device."""

    model: _Model
    threads: int
    batch: int
    sequence: int
    num_runs: int  # timed runs, over all rounds that count
    latency: Latency | None
    speedup: Ratio | None  # of the artifact: FP32's time over its own, by pairs of rounds
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
    """Hold the shapes and numbers of threads to measure, and in how many rounds each model has its turn."""

    sequences: tuple[int, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    rounds: int
    warmup_rounds: int


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
    models: dict[_Model, Path] = {ARTIFACT: bundle} | ({} if against is None else {FLOAT: against})
    cells: list[Cell] = []
    for done, (threads, batch, sequence) in enumerate(grid):
        progress("measure", done, len(grid))
        jobs: dict[_Model, Job] = {
            name: Job(model=str(model), threads=threads, batch=batch, sequence=sequence, vocabulary=vocabulary,
                      pixels=pixels)
            for name, model in models.items()
        }  # fmt: skip
        timed, _ = turns.timed_by_turns(jobs, shapes.rounds, shapes.warmup_rounds)
        cells.extend(_cells(jobs, timed, is_device=ran_on == "device"))
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


def _cells(jobs: Mapping[_Model, Job], timed: Mapping[_Model, Timed], is_device: bool) -> list[Cell]:
    """Make the cells of one shape from what was measured of the artifact and of FP32."""
    speedup = None
    if is_device and FLOAT in timed:
        speedup = turns.ratio(timed[ARTIFACT].turns, timed[FLOAT].turns, FLOAT)
    return [
        Cell(
            model=name,
            threads=job.threads,
            batch=job.batch,
            sequence=job.sequence,
            num_runs=len(timed[name].turns.runs_ms),
            latency=turns.percentiles(timed[name].turns.runs_ms) if is_device else None,
            speedup=speedup if name == ARTIFACT else None,
            peak_memory_bytes=timed[name].peak_memory_bytes,
        )
        for name, job in jobs.items()
    ]
