"""Write a .tflite file with the schema's object API: several subgraphs that share buffers and quantisation parameters.

Source: TensorFlow Lite schema version 3c, as ai-edge-litert 2.3.0 ships it (`schema_py_generated`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

DTYPES: dict[str, int] = {
    "int8": schema.TensorType.INT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "uint8": schema.TensorType.UINT8,
}
_FILE_IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3
_LARGEST_SHARED_BYTES = 64
_LARGEST_SMALL_CODE = 127  # operators above it are stored in the wide field only


@dataclass(frozen=True)
class QuantParams:
    """Hold a tensor's scales and zero points: one of each, or one for each slice along `axis`."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int = 0

    @classmethod
    def of(cls, scale: float, zero_point: int = 0) -> QuantParams:
        """Give the parameters of a whole tensor."""
        return cls((scale,), (zero_point,))


@dataclass(frozen=True)
class Tensor:
    """Hold a tensor's index in its subgraph, its shape, dtype and quantisation parameters."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    params: QuantParams | None


class _SharedParameters(schema.QuantizationParametersT):  # type: ignore[misc]
    """Pack equal quantisation parameters once: all tensors with them point at one table.

    Five subgraphs would otherwise repeat the scales of every weight: a tenth of the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._builder: flatbuffers.Builder | None = None
        self._offset = 0

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 (the schema's name)
        """Give the offset of the table, packed the first time."""
        if self._builder is not builder:
            self._offset = super().Pack(builder)
            self._builder = builder
        return self._offset


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Write each string and small vector once: all subgraphs repeat tensor names, shapes and indices."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self._offsets: dict[bytes, int] = {}
        self._vectors: dict[tuple[str, bytes], int] = {}

    def CreateString(self, s: bytes, encoding: str = "utf-8", errors: str = "strict") -> int:  # noqa: N802
        """Give the offset of the string, written the first time."""
        if s not in self._offsets:
            self._offsets[s] = super().CreateString(s, encoding, errors)
        return self._offsets[s]

    def CreateNumpyVector(self, x: NDArray[Any]) -> int:  # noqa: N802 (the schema's name)
        """Give the offset of a small vector, written the first time."""
        if x.nbytes > _LARGEST_SHARED_BYTES:
            return int(super().CreateNumpyVector(x))
        key = (x.dtype.str, x.tobytes())
        if key not in self._vectors:
            self._vectors[key] = int(super().CreateNumpyVector(x))
        return self._vectors[key]


class ModelWriter:
    """Collect subgraphs, and the buffers and parameters that they share, into one .tflite file."""

    def __init__(self, description: str) -> None:
        """Start an empty model."""
        self._description = description
        self._buffers = [schema.BufferT()]  # the first is empty by definition
        self._buffer_of: dict[bytes, int] = {}
        self._parameters: dict[QuantParams, _SharedParameters] = {}
        self._operator_codes: list[schema.OperatorCodeT] = []
        self._code_of: dict[tuple[int, int], int] = {}
        self._subgraphs: list[SubgraphWriter] = []

    def subgraph(self, name: str) -> SubgraphWriter:
        """Start a subgraph with a signature of the same name."""
        self._subgraphs.append(SubgraphWriter(self, name))
        return self._subgraphs[-1]

    def to_bytes(self) -> bytes:
        """Give the bytes of the file."""
        model = schema.ModelT()
        model.version = _SCHEMA_VERSION
        model.description = self._description.encode()
        model.operatorCodes = self._operator_codes
        model.buffers = self._buffers
        model.subgraphs = [part.finished() for part in self._subgraphs]
        model.signatureDefs = [part.signature(index) for index, part in enumerate(self._subgraphs)]
        builder = _Builder()
        builder.Finish(model.Pack(builder), file_identifier=_FILE_IDENTIFIER)
        return bytes(builder.Output())

    def buffer(self, data: NDArray[Any]) -> int:
        """Give the index of the buffer with these bytes."""
        content = np.ascontiguousarray(data).tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self._buffer_of:
            stored = schema.BufferT()
            stored.data = np.frombuffer(content, np.uint8)
            self._buffers.append(stored)
            self._buffer_of[digest] = len(self._buffers) - 1
        return self._buffer_of[digest]

    def parameters(self, params: QuantParams) -> schema.QuantizationParametersT:
        """Give the shared table of these parameters."""
        if params not in self._parameters:
            table = _SharedParameters()
            table.scale = np.array(params.scales, np.float32)
            table.zeroPoint = np.array(params.zero_points, np.int64)
            table.quantizedDimension = params.axis
            self._parameters[params] = table
        return self._parameters[params]

    def operator_code(self, builtin: int, version: int) -> int:
        """Give the index of an operator in this version."""
        key = (builtin, version)
        if key not in self._code_of:
            code = schema.OperatorCodeT()
            code.builtinCode = builtin
            code.deprecatedBuiltinCode = min(builtin, _LARGEST_SMALL_CODE)
            code.version = version
            self._operator_codes.append(code)
            self._code_of[key] = len(self._operator_codes) - 1
        return self._code_of[key]


@dataclass
class SubgraphWriter:
    """Collect the tensors and operators of one subgraph."""

    model: ModelWriter
    name: str
    _tensors: list[schema.TensorT] = field(default_factory=list)
    _operators: list[schema.OperatorT] = field(default_factory=list)
    _inputs: dict[str, Tensor] = field(default_factory=dict)
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    _constants: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, shape: Sequence[int], dtype: str, params: QuantParams | None = None) -> Tensor:
        """Add a tensor that an operator computes."""
        return self._add(name, tuple(shape), dtype, params, 0)

    def unnamed(self, shape: Sequence[int], dtype: str, params: QuantParams | None = None) -> Tensor:
        """Add an intermediate tensor named by its number: full names would take a hundred kilobytes."""
        return self.tensor(str(len(self._tensors)), shape, dtype, params)

    def constant(self, name: str, data: NDArray[Any], params: QuantParams | None = None) -> Tensor:
        """Add a constant tensor; the same name gives the same tensor again."""
        if name not in self._constants:
            buffer = self.model.buffer(data)
            self._constants[name] = self._add(name, data.shape, str(data.dtype), params, buffer)
        return self._constants[name]

    def input(self, name: str, shape: Sequence[int], dtype: str, params: QuantParams | None = None) -> Tensor:
        """Add an input of the signature."""
        self._inputs[name] = self.tensor(name, shape, dtype, params)
        return self._inputs[name]

    def output(self, name: str, tensor: Tensor) -> None:
        """Mark a tensor as an output of the signature."""
        self._outputs[name] = tensor

    def operator(
        self,
        builtin: int,
        version: int,
        inputs: Sequence[Tensor],
        output: Tensor,
        options: tuple[int, Any] | None = None,
    ) -> Tensor:
        """Add an operator with one output.

        Args:
            builtin: of `schema.BuiltinOperator`.
            version: of the operator, which decides the kernels that take it.
            inputs: in the operator's order.
            output: its result.
            options: the member of `schema.BuiltinOptions` and the table itself.
        """
        made = schema.OperatorT()
        made.opcodeIndex = self.model.operator_code(builtin, version)
        made.inputs = np.array([tensor.index for tensor in inputs], np.int32)
        made.outputs = np.array([output.index], np.int32)
        if options is not None:
            made.builtinOptionsType, made.builtinOptions = options
        self._operators.append(made)
        return output

    def finished(self) -> schema.SubGraphT:
        """Give the subgraph's table."""
        table = schema.SubGraphT()
        table.name = self.name.encode()
        table.tensors = self._tensors
        table.operators = self._operators
        table.inputs = np.array([tensor.index for tensor in self._inputs.values()], np.int32)
        table.outputs = np.array([tensor.index for tensor in self._outputs.values()], np.int32)
        return table

    def signature(self, index: int) -> schema.SignatureDefT:
        """Give the signature's table."""
        table = schema.SignatureDefT()
        table.signatureKey = self.name.encode()
        table.subgraphIndex = index
        table.inputs = [_port(name, tensor) for name, tensor in self._inputs.items()]
        table.outputs = [_port(name, tensor) for name, tensor in self._outputs.items()]
        return table

    def _add(self, name: str, shape: tuple[int, ...], dtype: str, params: QuantParams | None, buffer: int) -> Tensor:
        stored = schema.TensorT()
        stored.name = name.encode()
        stored.shape = np.array(shape, np.int32)
        stored.hasRank = True
        stored.type = DTYPES[dtype]
        stored.buffer = buffer
        if params is not None:
            stored.quantization = self.model.parameters(params)
        self._tensors.append(stored)
        return Tensor(len(self._tensors) - 1, shape, dtype, params)


def _port(name: str, tensor: Tensor) -> schema.TensorMapT:
    port = schema.TensorMapT()
    port.name = name.encode()
    port.tensorIndex = tensor.index
    return port
