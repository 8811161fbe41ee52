"""Summarise a .tflite file through its flatbuffers schema, without a runtime.

flatbuffers for Python follows any offset in a file. So every count is compared with the file's size before use, every
stored tensor must lie inside the file, and one boundary function catches all exceptions of the schema's code.

Source: TensorFlow Lite schema version 3c, as ai-edge-litert 2.3.0 ships it (`schema_py_generated`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.analysis.inspect.summary import ModelSummary, Port, Signature, StoredTensor, counted, grouped, largest
from edgeq.errors import ConfigError, ToolMissing

_IDENTIFIER = b"TFL3"
_LONGEST_NAME = 4096
_ADVICE = "Export it again, or check that the download is complete."


def has_identifier(path: Path) -> bool:
    """Tell whether a file has the identifier of .tflite files, TFL3."""
    with path.open("rb") as file:
        return file.read(8)[4:] == _IDENTIFIER


def summarize(path: Path) -> ModelSummary:
    """Summarise a .tflite file.

    Raises:
        ConfigError: it is not a readable .tflite file.
        ToolMissing: ai-edge-litert is not installed.
    """
    if not has_identifier(path):
        found = "an empty file" if not path.stat().st_size else f"no {_IDENTIFIER.decode()} in bytes 4 to 7"
        raise ConfigError(f"{path}: {found} where a .tflite model is needed. {_ADVICE}")
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise ToolMissing(f'{path}: reading it needs ai-edge-litert; pip install "edgeq[tflite]"') from error
    try:
        return _TfliteFile(path, schema).summary()
    except Exception as error:  # the boundary to the schema's code, which checks nothing and may raise anything
        reason = str(error) if isinstance(error, _Damaged) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: no readable .tflite file ({reason}); a whole model is needed. {_ADVICE}") from error


class _Damaged(Exception):
    """Report which rule of the format a file breaks."""


class _TfliteFile:
    """Read a file's flatbuffers tables from mapped memory."""

    def __init__(self, path: Path, schema: Any) -> None:
        self._path = path
        self._data = np.memmap(path, np.uint8, "r").data
        self._entries_left = len(self._data)  # every entry of a vector takes four bytes, or one that others share
        self._dtypes = _names(schema.TensorType)
        self._builtins = _names(schema.BuiltinOperator)
        self._model = schema.Model.GetRootAsModel(self._data, 0)
        buffers = self.each(self._model.BuffersLength, self._model.Buffers)
        self._buffer_bytes = [self._size_of(buffer) for buffer in buffers]

    def summary(self) -> ModelSummary:
        graphs = [_Graph(self, graph) for graph in self.each(self._model.SubgraphsLength, self._model.Subgraphs)]
        if not graphs:
            raise _Damaged("no subgraph")
        codes = [self._operator(code) for code in self.each(self._model.OperatorCodesLength, self._model.OperatorCodes)]
        kinds = [list(graph.operators(codes)) for graph in graphs]
        stored = list(self._stored_tensors(graphs))
        return ModelSummary(
            file=self._path.name,
            size_bytes=len(self._data),
            format="tflite",
            format_version=self._model.Version(),
            opsets={},
            inputs=graphs[0].inputs(),
            outputs=graphs[0].outputs(),
            signatures=tuple(self._signatures(graphs, [len(each) for each in kinds])),
            operators=counted(kinds[0]),
            tensors=grouped(stored),
            largest=largest(stored),
            bundle_files={},
        )

    def each(self, length: Callable[[], int], entry: Callable[[int], Any]) -> Iterator[Any]:
        """Give the entries of a vector, as long as there are no more than the file has room for."""
        count = length()
        self._entries_left -= count
        if self._entries_left < 0:
            raise _Damaged(f"a list of {count} entries, more than {len(self._data)} bytes hold")
        return (entry(number) for number in range(count))

    def dtype(self, tensor: Any) -> str:
        return self._dtypes[tensor.Type()].lower()

    def stored_bytes(self, tensor: Any) -> int:
        return int(_entry(self._buffer_bytes, tensor.Buffer(), "buffer"))

    def name(self, raw: bytes | None) -> str:
        if raw is not None and len(raw) > _LONGEST_NAME:
            raise _Damaged(f"a name of {len(raw)} bytes")
        return (raw or b"").decode()

    def _operator(self, code: Any) -> str:
        name = self._builtins[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        return f"CUSTOM {self.name(code.CustomCode())}" if name == "CUSTOM" else name

    def _signatures(self, graphs: list[_Graph], operators: list[int]) -> Iterator[Signature]:
        for signature in self.each(self._model.SignatureDefsLength, self._model.SignatureDefs):
            number = signature.SubgraphIndex()
            graph = _entry(graphs, number, "subgraph")
            inputs, outputs = (
                tuple(graph.port(port.TensorIndex(), self.name(port.Name())) for port in self.each(length, entry))
                for length, entry in (
                    (signature.InputsLength, signature.Inputs), (signature.OutputsLength, signature.Outputs),
                )
            )  # fmt: skip
            name = self.name(signature.SignatureKey())
            yield Signature(name=name, inputs=inputs, outputs=outputs, operators=operators[number])

    def _stored_tensors(self, graphs: list[_Graph]) -> Iterator[StoredTensor]:
        """Give each buffer with data once, under the name of the first tensor that uses it."""
        seen = set()
        for tensor in (tensor for graph in graphs for tensor in graph.tensors):
            number, size = tensor.Buffer(), self.stored_bytes(tensor)
            if not size or number in seen:
                continue
            seen.add(number)
            name, dtype, shape = self.name(tensor.Name()), self.dtype(tensor), _shape(tensor)
            needed = _bytes_of(dtype, prod(shape))
            if needed not in (None, size) and tensor.Sparsity() is None:
                raise _Damaged(f"{name} holds {size} bytes, {dtype}{list(shape)} has {needed}")
            yield StoredTensor(name=name, dtype=dtype, shape=shape, size_bytes=size)

    def _size_of(self, buffer: Any) -> int:
        """Give a buffer's size; in files over 2 GB buffers lie behind the tables."""
        if buffer.Offset() > 1:
            if buffer.Offset() + buffer.Size() > len(self._data):
                raise _Damaged(f"a buffer ends at byte {buffer.Offset() + buffer.Size()} of {len(self._data)}")
            return int(buffer.Size())
        return 0 if buffer.DataIsNone() else len(buffer.DataAsNumpy())


class _Graph:
    """Read one subgraph."""

    def __init__(self, file: _TfliteFile, graph: Any) -> None:
        self._file = file
        self._graph = graph
        self.tensors = list(file.each(graph.TensorsLength, graph.Tensors))
        for tensor in self.tensors:
            _parameters(tensor)

    def inputs(self) -> tuple[Port, ...]:
        return tuple(self.port(index) for index in self._file.each(self._graph.InputsLength, self._graph.Inputs))

    def outputs(self) -> tuple[Port, ...]:
        return tuple(self.port(index) for index in self._file.each(self._graph.OutputsLength, self._graph.Outputs))

    def port(self, index: int, name: str | None = None) -> Port:
        """Describe an input or output, named by the signature or else by its tensor."""
        tensor = _entry(self.tensors, index, "tensor")
        scales, zero_points = _parameters(tensor)
        shape = _shape(tensor)
        if not tensor.ShapeSignatureIsNone():  # -1 where the axis is dynamic
            shape = tuple(int(size) for size in tensor.ShapeSignatureAsNumpy())
        return Port(
            name=self._file.name(tensor.Name()) if name is None else name,
            dtype=self._file.dtype(tensor),
            shape=tuple("?" if size < 0 else size for size in shape),
            scale=float(scales[0]) if len(scales) == 1 else None,
            zero_point=int(zero_points[0]) if len(scales) == 1 else None,
        )

    def operators(self, codes: list[str]) -> Iterator[tuple[str, str]]:
        """Give each operator's name and the dtypes it computes on."""
        for operator in self._file.each(self._graph.OperatorsLength, self._graph.Operators):
            read, written = (
                [_entry(self.tensors, index, "tensor") for index in self._file.each(length, entry) if index != -1]
                for length, entry in (
                    (operator.InputsLength, operator.Inputs), (operator.OutputsLength, operator.Outputs),
                )
            )  # fmt: skip
            yield _entry(codes, operator.OpcodeIndex(), "operator code"), self._computes_on(read, written)

    def _computes_on(self, read: list[Any], written: list[Any]) -> str:
        """Name the dtypes of the operands (without constant shapes, axes, biases), and others of the results."""
        operands = [tensor for tensor in read if not self._is_stored_integer(tensor)] or read[:1]
        dtypes = list(dict.fromkeys(self._file.dtype(tensor) for tensor in operands))
        results = [dtype for dtype in dict.fromkeys(map(self._file.dtype, written)) if dtype not in dtypes]
        return " to ".join(part for part in (" x ".join(dtypes), " x ".join(results)) if part)

    def _is_stored_integer(self, tensor: Any) -> bool:
        return self._file.dtype(tensor) in ("int32", "int64") and self._file.stored_bytes(tensor) > 0


def _names(enumeration: type) -> dict[int, str]:
    return {number: name for name, number in vars(enumeration).items() if not name.startswith("_")}


def _entry(entries: list[Any], index: int, what: str) -> Any:
    """Give the entry at an index; a negative index, which Python would accept, is damage."""
    if not 0 <= index < len(entries):
        raise _Damaged(f"{what} {index} of {len(entries)}")
    return entries[index]


def _shape(tensor: Any) -> tuple[int, ...]:
    shape = () if tensor.ShapeIsNone() else tuple(int(size) for size in tensor.ShapeAsNumpy())
    if min(shape, default=0) < 0:
        raise _Damaged(f"a tensor of shape {list(shape)}")
    return shape


def _parameters(tensor: Any) -> tuple[Any, Any]:
    """Give a tensor's scales and zero points, empty for one that is not quantised."""
    codes = tensor.Quantization()
    if codes is None or codes.ScaleIsNone():
        return (), ()
    scales = codes.ScaleAsNumpy()
    zero_points = np.zeros(len(scales), np.int64) if codes.ZeroPointIsNone() else codes.ZeroPointAsNumpy()
    if len(zero_points) != len(scales) or not np.isfinite(scales).all():
        raise _Damaged(f"{len(scales)} scales with {len(zero_points)} zero points, or one that is no number")
    return scales, zero_points


def _bytes_of(dtype: str, elements: int) -> int | None:
    """Give the size of so many elements, or None where the dtype does not determine it."""
    if dtype.endswith("int4"):
        return (elements + 1) // 2
    try:
        return np.dtype(dtype).itemsize * elements
    except TypeError:  # strings, resources, and what numpy has no dtype for
        return None
