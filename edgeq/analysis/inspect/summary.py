"""Define the summary of a model file of any format."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Literal

from edgeq.records import Record

_LARGEST = 10


class Port(Record):
    """Describe an input or output; symbolic axes have names, and only quantised ports a scale."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    scale: float | None = None
    zero_point: int | None = None


class Signature(Record):
    """Describe a signature of a .tflite file; edgeq writes one for each bucket."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: int


class TensorGroup(Record):
    """Hold number, elements and bytes of the stored tensors of one dtype."""

    count: int
    elements: int
    size_bytes: int


class StoredTensor(Record):
    """Describe one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class ModelSummary(Record):
    """Summarise a model file.

    `operators` counts by operator and then by the dtypes it computes on. In an ONNX file these are read through
    DequantizeLinear: a MatMul of two dequantised tensors counts as `uint8 x int8`. Whether a runtime executes it in
    integers is in a bundle's manifest, under `placement`. For a .tflite file, `inputs`, `outputs` and `operators` are
    those of subgraph 0, which `invoke` runs, and a tensor shared by several signatures counts once.
    """

    file: str
    size_bytes: int
    format: Literal["onnx", "openvino", "tflite"]
    format_version: int  # ONNX's IR, OpenVINO's, or TFLite's schema
    opsets: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    signatures: tuple[Signature, ...]
    operators: dict[str, dict[str, int]]
    tensors: dict[str, TensorGroup]
    largest: tuple[StoredTensor, ...]
    bundle_files: dict[str, int]  # path in the bundle -> bytes; empty for a lone file


def grouped(tensors: Iterable[StoredTensor]) -> dict[str, TensorGroup]:
    """Group tensors by dtype, the largest group first."""
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    sums = {
        dtype: TensorGroup(
            count=len(group),
            elements=sum(prod(tensor.shape) for tensor in group),
            size_bytes=sum(tensor.size_bytes for tensor in group),
        )
        for dtype, group in groups.items()
    }
    return dict(sorted(sums.items(), key=lambda item: (-item[1].size_bytes, item[0])))


def largest(tensors: Iterable[StoredTensor]) -> tuple[StoredTensor, ...]:
    """Give the ten largest tensors."""
    return tuple(sorted(tensors, key=lambda tensor: (-tensor.size_bytes, tensor.name))[:_LARGEST])


def counted(kinds: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Count pairs of operator and dtypes, most frequent operators first."""
    counts: dict[str, dict[str, int]] = {}
    for operator, dtypes in kinds:
        by_dtypes = counts.setdefault(operator, {})
        by_dtypes[dtypes] = by_dtypes.get(dtypes, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    return {operator: dict(sorted(by_dtypes.items())) for operator, by_dtypes in ordered}
