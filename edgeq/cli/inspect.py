"""Run the verb `inspect`: list operators, dtypes and sizes of a model file or bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console

if TYPE_CHECKING:
    from edgeq.analysis.inspect.report import Anatomy, Port


def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, an OpenVINO IR (.xml), a .tflite file, or a bundle.")],
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Show a file's operators by dtype, its tensors by dtype, and sizes."""
    from edgeq.analysis.inspect.model_file import inspect as inspect_file

    anatomy = inspect_file(file)
    if as_json:
        console.put_json(anatomy.model_dump(mode="json"))
    else:
        _put_anatomy(anatomy)


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
    """Print inputs and outputs, with their scales and zero points."""
    for label, ports in (("input", inputs), ("output", outputs)):
        for port in ports:
            scale = "" if port.scale is None else f", scale {port.scale:g}, zero point {port.zero_point}"
            console.put(f"{indent}{label} {port.name}: {port.dtype}[{', '.join(map(str, port.shape))}]{scale}")
