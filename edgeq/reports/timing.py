"""Time every runtime on single texts, in rounds: each takes its turn, so that a busy minute falls on all alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edgeq.bundle import benchmark
from edgeq.errors import EdgeqError
from edgeq.reports.contents import RunTime
from edgeq.system.progress import Progress

ROUNDS, RUNS, WARMUP_RUNS = 3, 20, 5
LENGTHS = (16, 32, 128, 256)


def lengths(limit: int) -> tuple[int, ...]:
    """Choose the lengths to time: the usual ones that every runtime takes."""
    return tuple(tokens for tokens in LENGTHS if tokens <= limit) or (limit,)


def run_times(
    models: Mapping[str, Path],
    tokenizer: Path,
    sequences: Sequence[int],
    threads: int,
    progress: Progress,
) -> dict[str, tuple[RunTime, ...] | str]:
    """Time each model at each length, one text at a time.

    Args:
        models: by row: a bundle, or the float model's ONNX file.
        tokenizer: any of the model's, for the size of its vocabulary.
        sequences: tokens.
        threads: of each runtime.
        progress: called as `progress(stage, done, total)`.

    Returns:
        For each row its times, or the reason why there are none.
    """
    vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    samples: dict[tuple[str, int], list[benchmark.Sample]] = {}
    failed: dict[str, str] = {}
    steps = [(length, name) for _ in range(ROUNDS) for length in sequences for name in models]
    for done, (length, name) in enumerate(steps):
        progress("latency", done, len(steps))
        job = benchmark.Job(
            model=str(models[name]), threads=threads, batch=1, sequence=length, vocabulary=vocabulary, num_runs=RUNS,
            warmup_runs=WARMUP_RUNS,
        )  # fmt: skip
        if name in failed:
            continue
        try:
            samples.setdefault((name, length), []).append(benchmark.in_process(job))
        except EdgeqError as error:
            failed[name] = str(error)
    progress("latency", len(steps), len(steps))
    times = {name: tuple(_joined(samples[name, length], length, threads) for length in sequences)
             for name in models if name not in failed}  # fmt: skip
    return {**times, **failed}


def _joined(samples: Sequence[benchmark.Sample], tokens: int, threads: int) -> RunTime:
    """Take the runs of all rounds together."""
    runs = tuple(run for sample in samples for run in sample.latencies_ms)
    return RunTime(
        tokens=tokens,
        threads=threads,
        num_runs=len(runs),
        latency=benchmark.percentiles(runs),
        peak_memory_bytes=max(sample.peak_memory_bytes for sample in samples),
    )
