"""Run the verb `inspect`: list operators, dtypes and sizes of a model file or bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console

if TYPE_CHECKING:
    from edgeq.analysis.inspect.summary import ModelSummary, Port


def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, an OpenVINO IR (.xml), a .tflite file, or a bundle.")],
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Show a file's operators by dtype, its tensors by dtype, and sizes."""
    from edgeq.analysis.inspect.model_file import inspect as summarize

    summary = summarize(file)
    if as_json:
        console.put_json(summary.model_dump(mode="json"))
    else:
        _put_summary(summary)


def _put_summary(summary: ModelSummary) -> None:
    """Print a file's operators, tensors and sizes."""
    opsets = "".join(f", opset {domain} {version}" for domain, version in summary.opsets.items())
    kind = f"{'IR' if summary.format == 'onnx' else 'schema'} {summary.format_version}{opsets}"
    console.put(f"{summary.file}: {console.megabytes(summary.size_bytes)}, {kind}")
    if not summary.signatures:
        _put_ports("", summary.inputs, summary.outputs)
    for signature in summary.signatures:
        console.put(f"signature {signature.name}: {signature.operators} operators")
        _put_ports("  ", signature.inputs, signature.outputs)
    counts = [
        [operator, dtype, str(count)] for operator, kinds in summary.operators.items() for dtype, count in kinds.items()
    ]
    console.put_table(("operator", "computes on", "count"), counts)
    groups = [
        [dtype, str(group.count), str(group.elements), console.megabytes(group.size_bytes)]
        for dtype, group in summary.tensors.items()
    ]
    console.put_table(("tensor dtype", "tensors", "elements", "size"), groups)
    largest = [
        [tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)), console.megabytes(tensor.size_bytes)]
        for tensor in summary.largest
    ]
    console.put_table(("largest tensors", "dtype", "shape", "size"), largest)
    if summary.bundle_files:
        files = [[name, console.megabytes(size)] for name, size in summary.bundle_files.items()]
        console.put_table(("file of the bundle", "size"), files)


def _put_ports(indent: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Print inputs and outputs, with their scales and zero points."""
    for label, ports in (("input", inputs), ("output", outputs)):
        for port in ports:
            scale = "" if port.scale is None else f", scale {port.scale:g}, zero point {port.zero_point}"
            console.put(f"{indent}{label} {port.name}: {port.dtype}[{', '.join(map(str, port.shape))}]{scale}")
