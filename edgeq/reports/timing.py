"""Time every runtime on single texts, in interleaved rounds, so that other load affects all runtimes alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edgeq.bundle import benchmark
from edgeq.bundle.benchmark_child import Job, Sample
from edgeq.errors import EdgeqError
from edgeq.reports.contents import RunTime
from edgeq.system.progress import Progress

ROUNDS, RUNS, _WARMUP_RUNS = 3, 20, 5
_LENGTHS = (16, 32, 128, 256)


def lengths(limit: int) -> tuple[int, ...]:
    """Choose the lengths to time: 16, 32, 128 and 256 tokens, as far as every runtime takes them."""
    return tuple(tokens for tokens in _LENGTHS if tokens <= limit) or (limit,)


def run_times(
    models: Mapping[str, Path],
    tokenizer: Path,
    sequences: Sequence[int],
    threads: int,
    progress: Progress,
) -> dict[str, tuple[RunTime, ...] | str]:
    """Time each model at each length, one text per run.

    Args:
        models: name of the row -> a bundle, or the float model's ONNX file.
        tokenizer: of the model, for the size of its vocabulary.
        sequences: lengths in tokens.
        threads: of each runtime.
        progress: called as `progress(stage, done, total)`.

    Returns:
        For each row its times, or the reason why it has none.
    """
    vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    samples: dict[tuple[str, int], list[Sample]] = {}
    failed: dict[str, str] = {}
    steps = [(length, name) for _ in range(ROUNDS) for length in sequences for name in models]
    for done, (length, name) in enumerate(steps):
        progress("latency", done, len(steps))
        job = Job(
            model=str(models[name]), threads=threads, batch=1, sequence=length, vocabulary=vocabulary, num_runs=RUNS,
            warmup_runs=_WARMUP_RUNS,
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


def _joined(samples: Sequence[Sample], tokens: int, threads: int) -> RunTime:
    """Compute percentiles over the runs of all rounds, and the largest peak memory."""
    runs = tuple(run for sample in samples for run in sample.latencies_ms)
    return RunTime(
        tokens=tokens,
        threads=threads,
        num_runs=len(runs),
        latency=benchmark.percentiles(runs),
        peak_memory_bytes=max(sample.peak_memory_bytes for sample in samples),
    )
