"""Take an ONNX file, an OpenVINO IR or a bundle apart: operators by dtype, tensors by dtype, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from edgeq import openvino_ir
from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.records import Record

_LARGEST = 10


class Port(Record):
    """Describe an input or output of the graph; a symbolic axis is there by its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class TensorGroup(Record):
    """Sum up the stored tensors of one dtype."""

    count: int
    elements: int
    size_bytes: int


class StoredTensor(Record):
    """Describe one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class Anatomy(Record):
    """Say what an ONNX file or an OpenVINO IR is made of.

    `operators` counts by operator and then by the dtypes it computes on, seen through DequantizeLinear: a MatMul of two
    dequantised tensors counts as `uint8 x int8`. Whether a runtime really runs it in integers stands in a bundle's
    manifest, under `placement`.
    """

    file: str
    size_bytes: int
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, dict[str, int]]
    tensors: dict[str, TensorGroup]
    largest: tuple[StoredTensor, ...]
    bundle_files: dict[str, int]  # path in the bundle -> bytes; empty for a lone file


def inspect(path: Path) -> Anatomy:
    """Take an ONNX file, an OpenVINO IR (its .xml) or a bundle's artifact apart.

    Raises:
        ConfigError: nothing is there, or it is neither an ONNX file, nor an IR, nor a bundle of one.
        BundleCorrupt: the manifest cannot be read or names an artifact that is not there.
    """
    if path.is_dir():
        model_path = _artifact_of(path)
        bundle_files = {
            found.relative_to(path).as_posix(): found.stat().st_size
            for found in sorted(path.rglob("*"))
            if found.is_file()
        }
    elif path.is_file():
        model_path, bundle_files = path, {}
    else:
        raise ConfigError(f"{path}: nothing is there; an ONNX file, an IR or a bundle is needed. Check the path.")
    name = model_path.name if not bundle_files else model_path.relative_to(path).as_posix()
    if model_path.suffix == ".xml":
        return _ir_anatomy(name, model_path, bundle_files)
    model = read_onnx(model_path)
    dtypes = _dtypes(model)
    stored = _stored_tensors(model)
    return Anatomy(
        file=name,
        size_bytes=model_path.stat().st_size + _external_bytes(model, model_path),
        ir_version=model.ir_version,
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        inputs=tuple(_port(value) for value in model.graph.input),
        outputs=tuple(_port(value) for value in model.graph.output),
        operators=_operators(model.graph, dtypes),
        tensors=_groups(stored),
        largest=tuple(sorted(stored, key=lambda tensor: (-tensor.size_bytes, tensor.name))[:_LARGEST]),
        bundle_files=bundle_files,
    )


def _ir_anatomy(name: str, path: Path, bundle_files: dict[str, int]) -> Anatomy:
    """Take an OpenVINO IR apart."""
    network, weights = openvino_ir.read_ir(path), openvino_ir.weights_of(path)
    stored = [
        StoredTensor(name=layer.name, dtype=port.dtype, shape=port.shape, size_bytes=size)
        for layer, port, size in openvino_ir.stored(network, weights)
    ]
    parameters = [(layer.name, layer.outputs[0]) for layer in network.of("Parameter")]
    results = [network.port(layer.inputs[0]) for layer in network.of("Result")]
    opsets = [layer.opset.removeprefix("opset") for layer in network.layers.values()]
    return Anatomy(
        file=name,
        size_bytes=path.stat().st_size + weights.stat().st_size,
        ir_version=network.version,
        opsets={"openvino": max(int(number) for number in opsets if number.isdigit())},
        inputs=tuple(_ir_port(name, port) for name, port in parameters),
        outputs=tuple(_ir_port(next(iter(port.names), "?"), port) for port in results),
        operators=_ordered(network.computed()),
        tensors=_groups(stored),
        largest=tuple(sorted(stored, key=lambda tensor: (-tensor.size_bytes, tensor.name))[:_LARGEST]),
        bundle_files=bundle_files,
    )


def _ir_port(name: str, port: openvino_ir.OutputPort) -> Port:
    return Port(name=name, dtype=port.dtype, shape=tuple("?" if size < 0 else size for size in port.shape))


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data, and refuse one that is damaged.

    Raises:
        ConfigError: the bytes are not an ONNX model, or the model breaks ONNX's own rules.
    """
    advice = "Export it again, or check that the download is complete."
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ConfigError(f"{path}: not a readable ONNX file ({error}); a whole model is needed. {advice}") from error
    if not model.ir_version or not model.graph.node:
        found = "an empty file" if not path.stat().st_size else "no graph"
        raise ConfigError(f"{path}: {found} where an ONNX model is needed. {advice}")
    try:
        # By path: a model with external data is checked beside it, and one over 2 GB does not fit into one message.
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path}: breaks ONNX's rules ({reason}). {advice}") from error
    return model


def _artifact_of(bundle: Path) -> Path:
    """Find the file that the bundle's runtime loads."""
    if not (bundle / "manifest.json").is_file():
        raise ConfigError(
            f"{bundle}: no manifest.json; inspect takes an ONNX file, an OpenVINO IR or a bundle. "
            "Name the file itself, or a directory that `edgeq export` wrote."
        )
    from edgeq.bundle import load_manifest

    model_path = bundle / load_manifest(bundle).artifact.files[0].path
    if model_path.suffix not in (".onnx", ".xml"):
        raise ConfigError(
            f"{model_path}: inspect takes ONNX files and OpenVINO IRs. The bundle's manifest.json lists this file's "
            "operators under artifact.placement; another tool, such as TensorFlow's analyzer, shows its tensors."
        )
    if not model_path.is_file():
        raise BundleCorrupt(f"{model_path}: named by manifest.json, but not there. Export the bundle again.")
    return model_path


def _dtype_name(element_type: int) -> str:
    """Spell an ONNX element type as numpy does."""
    name: str = onnx.TensorProto.DataType.Name(element_type).lower()
    return {"float": "float32", "double": "float64", "undefined": "unknown"}.get(name, name)


def _port(value: onnx.ValueInfoProto) -> Port:
    """Describe one input or output."""
    tensor = value.type.tensor_type
    shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in tensor.shape.dim]
    return Port(name=value.name, dtype=_dtype_name(tensor.elem_type), shape=tuple(shape))


def _stored_tensors(model: onnx.ModelProto) -> list[StoredTensor]:
    """List initializers and the tensors in Constant nodes."""
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
    """Add up the external data files that the model names and that are there."""
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    files = {path.parent / entry.value for entry in entries if entry.key == "location"}
    return sum(file.stat().st_size for file in files if file.is_file())


def _groups(tensors: Iterable[StoredTensor]) -> dict[str, TensorGroup]:
    """Sum up tensors by dtype, the largest group first."""
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


def _dtypes(model: onnx.ModelProto) -> dict[str, str]:
    """Give every value's dtype, as far as shape inference knows it."""
    if any(tensor.external_data for tensor in model.graph.initializer):
        graph = model.graph  # inference would read the data; the file's own value_info has to do
    else:
        graph = onnx.shape_inference.infer_shapes(model).graph
    dtypes = {tensor.name: _dtype_name(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dtypes[value.name] = _dtype_name(value.type.tensor_type.elem_type)
    return dtypes


def _operators(graph: onnx.GraphProto, dtypes: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Count nodes by operator and by the dtypes they compute on, most frequent operators first."""
    quantised = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    counts: dict[str, Counter[str]] = {}
    for node in graph.node:
        operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        counts.setdefault(operator, Counter())[_computes_on(node, dtypes, quantised)] += 1
    return _ordered(counts)


def _ordered(counts: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Put the most frequent operators first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return {operator: dict(sorted(by_dtype.items())) for operator, by_dtype in ordered}


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
