"""Summarise an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import onnx

from edgeq.analysis.inspect.summary import ModelSummary, Port, StoredTensor, counted, grouped, largest
from edgeq.graph.read import read_onnx


def summarize(path: Path) -> ModelSummary:
    """Summarise an ONNX file; its external data counts towards the size.

    Raises:
        ConfigError: it is not a readable ONNX file.
    """
    model = read_onnx(path)
    stored = _stored_tensors(model)
    return ModelSummary(
        file=path.name,
        size_bytes=path.stat().st_size + _external_bytes(model, path),
        format="onnx",
        format_version=model.ir_version,
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        inputs=tuple(_port(value) for value in model.graph.input),
        outputs=tuple(_port(value) for value in model.graph.output),
        signatures=(),
        operators=_operators(model.graph, _dtypes(model)),
        tensors=grouped(stored),
        largest=largest(stored),
        bundle_files={},
    )


def _dtype_name(element_type: int) -> str:
    """Give numpy's name of an ONNX element type."""
    name: str = onnx.TensorProto.DataType.Name(element_type).lower()
    return {"float": "float32", "double": "float64", "undefined": "unknown"}.get(name, name)


def _port(value: onnx.ValueInfoProto) -> Port:
    """Describe one input or output."""
    tensor = value.type.tensor_type
    shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in tensor.shape.dim]
    return Port(name=value.name, dtype=_dtype_name(tensor.elem_type), shape=tuple(shape))


def _stored_tensors(model: onnx.ModelProto) -> list[StoredTensor]:
    """List the initializers and the tensors of Constant nodes."""
    constants = [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return [
        StoredTensor(
            name=tensor.name or "(constant)",
            dtype=_dtype_name(tensor.data_type),
            shape=tuple(tensor.dims),
            size_bytes=_tensor_bytes(tensor),
        )
        for tensor in (*model.graph.initializer, *constants)
    ]


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Give the bytes of a tensor's elements; 4-bit types share a byte."""
    elements: int = prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    if "INT4" in onnx.TensorProto.DataType.Name(tensor.data_type):
        return (elements + 1) // 2
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return elements * itemsize


def _external_bytes(model: onnx.ModelProto, path: Path) -> int:
    """Add up the sizes of the model's external data files that exist."""
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    files = {path.parent / entry.value for entry in entries if entry.key == "location"}
    return sum(file.stat().st_size for file in files if file.is_file())


def _dtypes(model: onnx.ModelProto) -> dict[str, str]:
    """Give value -> dtype, as far as shape inference finds it."""
    if any(tensor.external_data for tensor in model.graph.initializer):
        graph = model.graph  # inference would read the data; the file's own value_info serves
    else:
        graph = onnx.shape_inference.infer_shapes(model).graph
    dtypes = {tensor.name: _dtype_name(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dtypes[value.name] = _dtype_name(value.type.tensor_type.elem_type)
    return dtypes


def _operators(graph: onnx.GraphProto, dtypes: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Count nodes by operator and by the dtypes they compute on, most frequent operators first."""
    quantised = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}

    def operator(node: onnx.NodeProto) -> str:
        return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type

    return counted((operator(node), _computes_on(node, dtypes, quantised)) for node in graph.node)


def _computes_on(node: onnx.NodeProto, dtypes: Mapping[str, str], quantised: Mapping[str, str]) -> str:
    """Name the dtypes a node computes on: its inputs of the output's dtype, seen through DequantizeLinear."""

    def dtype_of(name: str) -> str:
        return dtypes[name] if name in dtypes else "unknown"

    result = dtype_of(node.output[0])
    if node.op_type == "QuantizeLinear":
        return result
    if node.op_type == "DequantizeLinear":
        return dtype_of(node.input[0])
    alike = [name for name in node.input if name and dtype_of(name) == result]
    operands = alike or [name for name in node.input[:1] if name]
    seen = [dtype_of(quantised[name] if name in quantised else name) for name in operands]
    return " x ".join(dict.fromkeys(seen)) or result
