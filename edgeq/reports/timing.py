"""Time every runtime on single texts by turns, so that other load affects all runtimes alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edgeq.bundle import turns
from edgeq.bundle.benchmark_child import Job
from edgeq.bundle.turns import Timed
from edgeq.reports.contents import RunTime
from edgeq.system.progress import Progress

ROUNDS, _WARMUP_ROUNDS = 80, 6
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
    """Time each model at each length, one text per run; all of them take turns in the same rounds.

    Args:
        models: name of the row -> a bundle, or the float model's ONNX file. Ratios are against the first that runs.
        tokenizer: of the model, for the size of its vocabulary.
        sequences: lengths in tokens.
        threads: of each runtime.
        progress: called as `progress(stage, done, total)`.

    Returns:
        For each row its times, or the reason why it has none.
    """
    vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    timed: dict[int, dict[str, Timed]] = {}
    failed: dict[str, str] = {}
    for done, tokens in enumerate(sequences):
        progress("latency", done, len(sequences))
        jobs = {
            name: Job(model=str(model), threads=threads, batch=1, sequence=tokens, vocabulary=vocabulary)
            for name, model in models.items() if name not in failed
        }  # fmt: skip
        timed[tokens], errors = turns.timed_by_turns(jobs, ROUNDS, _WARMUP_ROUNDS, goes_on=True)
        failed |= {name: str(error) for name, error in errors.items()}
    progress("latency", len(sequences), len(sequences))
    stayed = [name for name in models if name not in failed]
    times = {
        name: tuple(_run_time(timed[tokens], name, stayed[0], tokens, threads) for tokens in sequences)
        for name in stayed
    }
    return {**times, **failed}


def _run_time(timed: Mapping[str, Timed], name: str, reference: str, tokens: int, threads: int) -> RunTime:
    """Compute percentiles over the runs of all rounds, and the ratio to the reference's times."""
    own, other = timed[name], timed[reference]
    return RunTime(
        tokens=tokens,
        threads=threads,
        num_runs=len(own.turns.runs_ms),
        latency=turns.percentiles(own.turns.runs_ms),
        speedup=None if name == reference else turns.ratio(own.turns, other.turns, reference),
        peak_memory_bytes=own.peak_memory_bytes,
    )
