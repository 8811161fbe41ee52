"""Find the operator that crashes a compiler: cut a .tflite file into files of one operator, and compile each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeq.backends.tflite import kernels


def find(data: bytes, dies: Callable[[bytes], bool]) -> str | None:
    """Describe the first operator whose file alone crashes the compiler; None where none does.

    Args:
        data: a .tflite file of one signature.
        dies: tells whether the compiler crashes on a file.
    """
    return next((description for description, one in singles(data) if dies(one)), None)


def singles(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Give a description and a one-operator file for each distinct name, version, dtypes and shapes."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    graph = model.subgraphs[0]
    seen = set()
    for operator, described in zip(graph.operators, kernels.read(data).operators, strict=False):
        read = [graph.tensors[index] for index in operator.inputs]
        shapes = tuple(tuple(np.atleast_1d(tensor.shape).tolist()) for tensor in read)
        kind = described.name, described.version, described.dtypes, shapes
        if kind in seen:
            continue
        seen.add(kind)
        dtypes = " ".join(described.dtypes[:-1])
        yield f"{described.name} ({described.output}, from {dtypes} to {described.dtypes[-1]})", _cut(model, operator)


def _cut(model: schema.ModelT, operator: schema.OperatorT) -> bytes:
    """Give a .tflite file of one operator and its constant operands; other operands become inputs."""
    graph = model.subgraphs[0]
    used = sorted({int(index) for index in [*operator.inputs, *operator.outputs] if index >= 0})
    position = {index: number for number, index in enumerate(used)}
    alone = schema.OperatorT()
    alone.inputs = np.array([position.get(int(index), -1) for index in operator.inputs], np.int32)
    alone.outputs = np.array([position[int(index)] for index in operator.outputs], np.int32)
    alone.builtinOptionsType, alone.builtinOptions = operator.builtinOptionsType, operator.builtinOptions
    alone.opcodeIndex = 0
    cut = schema.ModelT()
    cut.version, cut.description = model.version, b"one operator"
    cut.operatorCodes = [model.operatorCodes[operator.opcodeIndex]]
    cut.buffers = [schema.BufferT()]
    part = schema.SubGraphT()
    part.name, part.tensors, part.operators = b"one", [], [alone]
    fed = []
    for index in used:
        before = graph.tensors[index]
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.hasRank = before.name, before.shape, before.type, True
        tensor.quantization = before.quantization
        content = model.buffers[before.buffer].data
        if content is not None and len(content):
            cut.buffers.append(model.buffers[before.buffer])
            tensor.buffer = len(cut.buffers) - 1
        elif index in operator.inputs:
            fed.append(position[index])
        part.tensors.append(tensor)
    part.inputs, part.outputs = np.array(fed, np.int32), alone.outputs
    cut.subgraphs = [part]
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(cut.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
