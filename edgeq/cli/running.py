"""The verbs that run or look into what is there: embed, bench, inspect."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.proving import Against, BundleDir, find_float_model
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeq.analysis.inspect.report import Anatomy, Port
    from edgeq.bundle.benchmark import Benchmark, Cell
    from edgeq.records import Manifest


class Role(StrEnum):
    """Say what texts are to a search."""

    QUERY = "query"
    DOCUMENT = "document"


def embed(
    bundle: BundleDir,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the vectors go, float32[texts, dim], as .npy.")],
    texts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts: .txt, .jsonl, .csv; - reads lines from standard input, the default."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images, by name, for a bundle that embeds images.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The most texts run at once.")] = 32,
    prompt: Annotated[
        str | None, typer.Option(metavar="NAME", help="Put this of the model's prompts before each.")
    ] = None,
    role: Annotated[
        Role | None, typer.Option(help="What the texts are: the prompt that the model has for it goes before each.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves it to the target.")] = 0,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Turn texts or images into vectors with BUNDLE.

    Raises:
        ConfigError: the texts or images cannot be read or are not what BUNDLE takes, --out is no .npy file, or the
            prompt is not there or given twice.
    """
    from edgeq.bundle import embedder

    if out.suffix != ".npy":
        raise ConfigError(f"--out: {out} does not end in .npy, the format that is written. Rename it.")
    if prompt is not None and role is not None:
        raise ConfigError(f"--prompt {prompt}, --role {role}: both say what goes before each text. Give one of them.")
    chosen = _given(bundle, texts, images, column)
    loaded = embedder.load(bundle, threads)
    encode = {None: loaded.encode, Role.QUERY: loaded.encode_query, Role.DOCUMENT: loaded.encode_document}[role]
    vectors = encode(chosen, batch_size=batch_size, prompt_name=prompt)
    _save(out, vectors)
    if as_json:
        kind = "texts" if images is None else "images"
        console.put_json({"path": str(out), kind: vectors.shape[0], "dim": vectors.shape[1]})
    else:
        console.put(str(out))


def bench(
    bundle: BundleDir,
    sequence: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens; default: 16,32,128,256, as far as the model goes.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Texts at once.")] = "1,8,32",
    threads: Annotated[
        str | None, typer.Option("--threads", "--num_threads", metavar="N,N,...", help="Default: every core.")
    ] = None,
    num_runs: Annotated[int, typer.Option("--num-runs", "--num_runs", min=1, help="Runs that count.")] = 50,
    warmup_runs: Annotated[int, typer.Option("--warmup-runs", "--warmup_runs", min=0, help="Runs before.")] = 10,
    against: Against = None,
    alone: Annotated[bool, typer.Option("--alone", help="Measure the artifact only, not FP32 beside it.")] = False,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Measure latency and peak memory of BUNDLE beside FP32, each in a process of its own."""
    from edgeq.bundle.benchmark import Shapes, measure
    from edgeq.bundle.manifest import load_manifest
    from edgeq.data.tokens import token_limit

    manifest = load_manifest(bundle)
    limit = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)
    shapes = Shapes(
        sequences=_sequences(manifest, limit) if sequence is None else _numbers("--sequence", sequence),
        batches=_numbers("--batch", batch),
        threads=_numbers("--threads", threads or str(len(os.sched_getaffinity(0)))),
        num_runs=num_runs,
        warmup_runs=warmup_runs,
    )
    float_file = None if alone else find_float_model(manifest, against)
    with console.stages() as report:
        found = measure(bundle, shapes, float_file, report)
    if as_json:
        console.put_json(found.model_dump(mode="json"))
        return
    _put_benchmark(found)


def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, an OpenVINO IR (.xml), a .tflite file, or a bundle.")],
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Show a file's operators by dtype, its tensors by dtype, and sizes."""
    from edgeq.analysis.inspect.model_file import inspect as take_apart

    anatomy = take_apart(file)
    if as_json:
        console.put_json(anatomy.model_dump(mode="json"))
    else:
        _put_anatomy(anatomy)


def _given(bundle: Path, texts: str | None, images: Path | None, column: str | None) -> list[str]:
    """Read texts, or list the paths of images.

    Raises:
        ConfigError: they are not what the bundle takes, or cannot be read.
    """
    from edgeq.bundle.manifest import load_manifest
    from edgeq.data.batches import require_texts
    from edgeq.data.text_files import read_texts
    from edgeq.pipeline.validate import require_kind

    manifest = load_manifest(bundle)
    if images is None:
        require_texts(manifest.float_model.inputs, bundle, "Give a folder with --images.")
        return _standard_input() if texts in (None, "-") else read_texts(Path(texts), column)
    require_kind(manifest, bundle, None if texts is None else Path(texts), images)
    if column is not None:
        raise ConfigError(f"--column {column}: is for texts, and {bundle} takes images. Leave it out.")
    from edgeq.data.images import image_paths  # here: texts need no Pillow

    return [str(path) for path in image_paths(images)]


def _standard_input() -> list[str]:
    """Read texts from standard input, one a line; blank lines are left out.

    Raises:
        ConfigError: the bytes are no UTF-8, or no line holds a text.
    """
    data = typer.get_binary_stream("stdin").read()
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"standard input, line {number}: byte {data[error.start]:#04x} is no UTF-8. Convert the text to UTF-8."
        ) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError("standard input: no text; a line that is not blank is needed. Give lines, or --texts FILE.")
    return texts


def _save(out: Path, vectors: NDArray[np.float32]) -> None:
    """Write float32[texts, dim] as .npy, whole or not at all."""
    import numpy as np

    from edgeq.system.files import replacing

    with replacing(out) as partial, partial.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read positive whole numbers between commas.

    Raises:
        BadParameter: something else stands there.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"{text!r}: positive whole numbers are needed, like 16,32", param_hint=option)
    return tuple(dict.fromkeys(int(word) for word in words))


def _sequences(manifest: Manifest, max_sequence: int) -> tuple[int, ...]:
    """Choose the lengths to measure where none is asked for: one where every text is padded to the longest."""
    from edgeq.frontend.torch.text_towers import padded_to

    if padded_to(manifest.source.modules):
        return (max_sequence,)
    return tuple(tokens for tokens in (16, 32, 128, 256) if tokens <= max_sequence) or (max_sequence,)


def _put_benchmark(found: Benchmark) -> None:
    """Print one line a cell; latency is there only where it means something."""
    sizes = f"{console.megabytes(found.artifact_bytes)}"
    if found.float_bytes is not None:
        sizes += f", FP32 {console.megabytes(found.float_bytes)}"
    title = f"{found.target}: {sizes}; ran on {found.ran_on} ({found.machine})"
    columns = ("model", "threads", "batch", "tokens", "p50 ms", "p90 ms", "p99 ms", "speed-up", "peak memory")
    console.put_table(columns, [_cell(cell) for cell in found.cells], title)
    if found.ran_on != "device":
        console.note(f"latency is not shown: this machine is not what {found.target} is made for ({found.ran_on})")


def _cell(cell: Cell) -> list[str]:
    """Turn a cell into a table row."""
    times = ["-"] * 3
    if cell.latency is not None:
        times = [f"{value:.2f}" for value in (cell.latency.p50_ms, cell.latency.p90_ms, cell.latency.p99_ms)]
    speedup = "-" if cell.speedup is None else f"{cell.speedup:.2f}x"
    shape = [str(cell.threads), str(cell.batch), str(cell.sequence)]
    return [cell.model, *shape, *times, speedup, console.megabytes(cell.peak_memory_bytes)]


def _put_anatomy(anatomy: Anatomy) -> None:
    """Print a file's operators, tensors and sizes."""
    opsets = "".join(f", opset {domain} {version}" for domain, version in anatomy.opsets.items())
    kind = f"{'IR' if anatomy.format == 'onnx' else 'schema'} {anatomy.format_version}{opsets}"
    console.put(f"{anatomy.file}: {console.megabytes(anatomy.size_bytes)}, {kind}")
    if not anatomy.signatures:
        _put_ports("", anatomy.inputs, anatomy.outputs)
    for signature in anatomy.signatures:
        console.put(f"signature {signature.name}: {signature.operators} operators")
        _put_ports("  ", signature.inputs, signature.outputs)
    counts = [
        [operator, dtype, str(count)] for operator, kinds in anatomy.operators.items() for dtype, count in kinds.items()
    ]
    console.put_table(("operator", "computes on", "count"), counts)
    groups = [
        [dtype, str(group.count), str(group.elements), console.megabytes(group.size_bytes)]
        for dtype, group in anatomy.tensors.items()
    ]
    console.put_table(("tensor dtype", "tensors", "elements", "size"), groups)
    largest = [
        [tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)), console.megabytes(tensor.size_bytes)]
        for tensor in anatomy.largest
    ]
    console.put_table(("largest tensors", "dtype", "shape", "size"), largest)
    if anatomy.bundle_files:
        files = [[name, console.megabytes(size)] for name, size in anatomy.bundle_files.items()]
        console.put_table(("file of the bundle", "size"), files)


def _put_ports(indent: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Print inputs and outputs, with what their codes mean."""
    for label, ports in (("input", inputs), ("output", outputs)):
        for port in ports:
            codes = "" if port.scale is None else f", scale {port.scale:g}, zero point {port.zero_point}"
            console.put(f"{indent}{label} {port.name}: {port.dtype}[{', '.join(map(str, port.shape))}]{codes}")
