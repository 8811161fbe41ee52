"""Run the verb `bench`: measure latency and memory of a bundle beside FP32."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import Against, BundleDir, find_float_model

if TYPE_CHECKING:
    from edgeq.bundle.benchmark import Benchmark, Cell
    from edgeq.records import Manifest


def bench(
    bundle: BundleDir,
    sequence: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens; default: the target's buckets, or 16,32,128,256.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Texts at once.")] = "1,8,32",
    threads: Annotated[
        str | None, typer.Option("--threads", "--num_threads", metavar="N,N,...", help="Default: every core.")
    ] = None,
    rounds: Annotated[
        int,
        typer.Option("--rounds", "--num-runs", "--num_runs", min=1, help="Rounds that count; each model has its turn."),
    ] = 80,
    warmup_rounds: Annotated[
        int, typer.Option("--warmup-rounds", "--warmup-runs", "--warmup_runs", min=0, help="Rounds before.")
    ] = 10,
    against: Against = None,
    alone: Annotated[bool, typer.Option("--alone", help="Measure the artifact only, not FP32 beside it.")] = False,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Measure latency and peak memory of BUNDLE beside FP32, by turns, each in a process of its own."""
    from edgeq.bundle.benchmark import Shapes, measure
    from edgeq.bundle.manifest import load_manifest
    from edgeq.data.tokens import token_limit

    manifest = load_manifest(bundle)
    limit = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)
    shapes = Shapes(
        sequences=_sequences(manifest, limit) if sequence is None else _numbers("--sequence", sequence),
        batches=_numbers("--batch", batch),
        threads=_numbers("--threads", threads or str(len(os.sched_getaffinity(0)))),
        rounds=rounds,
        warmup_rounds=warmup_rounds,
    )
    float_file = None if alone else find_float_model(manifest, against)
    with console.stages() as progress:
        found = measure(bundle, shapes, float_file, progress)
    if as_json:
        console.put_json(found.model_dump(mode="json"))
        return
    _put_benchmark(found)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read positive whole numbers between commas.

    Raises:
        BadParameter: the text is something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"{text!r}: positive whole numbers are needed, like 16,32", param_hint=option)
    return tuple(dict.fromkeys(int(word) for word in words))


def _sequences(manifest: Manifest, max_sequence: int) -> tuple[int, ...]:
    """Choose the default lengths: the target's buckets; only the longest where the model pads every text to it."""
    from edgeq.data.tokens import bucket_lengths
    from edgeq.frontend.torch.text_towers import padded_to

    if padded_to(manifest.source.modules):
        return (max_sequence,)
    buckets = bucket_lengths(manifest.target.buckets_tokens, max_sequence)
    return buckets or tuple(tokens for tokens in (16, 32, 128, 256) if tokens <= max_sequence) or (max_sequence,)


def _put_benchmark(found: Benchmark) -> None:
    """Print one line for each cell; latency only where the artifact ran on its device."""
    sizes = f"{console.megabytes(found.artifact_bytes)}"
    if found.float_bytes is not None:
        sizes += f", FP32 {console.megabytes(found.float_bytes)}"
    title = f"{found.target}: {sizes}; ran on {found.ran_on} ({found.machine})"
    columns = ("model", "threads", "batch", "tokens", "p50 ms", "p90 ms", "p99 ms", "speed-up", "peak memory")
    console.put_table(columns, [_cell(cell) for cell in found.cells], title)
    for told in [cell.speedup for cell in found.cells if cell.speedup is not None][:1]:
        console.note(
            f"speed-up: the median of {told.pairs} paired ratios, in the interval that holds it in "
            f"{told.level:.0%} of cases"
        )
    if found.ran_on != "device":
        console.note(f"latency is not shown: this machine is not what {found.target} is made for ({found.ran_on})")


def _cell(cell: Cell) -> list[str]:
    """Format a cell as a table row."""
    times = ["-"] * 3
    if cell.latency is not None:
        times = [f"{value:.2f}" for value in (cell.latency.p50_ms, cell.latency.p90_ms, cell.latency.p99_ms)]
    speedup = "-" if cell.speedup is None else cell.speedup.shown()
    shape = [str(cell.threads), str(cell.batch), str(cell.sequence)]
    return [cell.model, *shape, *times, speedup, console.megabytes(cell.peak_memory_bytes)]
