"""Keep the weights of models over 2 GB in files (ONNX external data): they are mapped, and never all in memory.

In memory such a model is an ordinary ONNX model, small enough for protobuf, whose large initializers name an absolute
path as their external data; `onnx_ir` maps them, and ONNX Runtime does. On disk the names are relative, as ONNX asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import ConfigError
from edgeq.system.files import replacing, storage_errors

LARGE_BYTES = 2_000_000_000  # protobuf refuses messages of 2 GiB
KEPT_BYTES = 1 << 20  # smaller arrays stay in memory
DATA = ".data"  # ends the name of the file beside a model
DIGEST = "edgeq.weights_sha256"  # in a model's metadata: its own hash then tells its weights, too
_ALIGNMENT = 4096  # mapping starts at pages
_CHUNK = 1 << 24

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


def is_external(tensor: TensorProto) -> bool:
    """Tell whether an initializer's values lie in a file."""
    return tensor.data_location == TensorProto.EXTERNAL


def place(tensor: TensorProto) -> tuple[str, int, int]:
    """Give the file, the offset and the number of bytes of an external initializer.

    Raises:
        ConfigError: it names none, or as many bytes as its shape does not have.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        location, offset, length = entries["location"], int(entries.get("offset", 0)), int(entries.get("length", size))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{tensor.name}: its external data is damaged ({error!r}); make it again") from error
    if offset < 0 or length != size or min(tensor.dims, default=0) < 0:
        raise ConfigError(f"{tensor.name}: has {length} bytes of external data at {offset}; its shape has {size}")
    return location, offset, length


def array(tensor: TensorProto) -> NDArray[Any]:
    """Give an initializer's values; those that lie in a file are mapped, read-only."""
    if not is_external(tensor):
        return numpy_helper.to_array(tensor)
    location, offset, _ = place(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(location, dtype, "r", offset, tuple(tensor.dims))


def size_bytes(model: onnx.ModelProto) -> int:
    """Give a model's size with its weights, wherever they lie."""
    return int(model.ByteSize()) + sum(place(tensor)[2] for tensor in model.graph.initializer if is_external(tensor))


def is_large(model: onnx.ModelProto) -> bool:
    """Tell whether a model must not be in memory as a whole."""
    return size_bytes(model) > LARGE_BYTES


def has_data(path: Path) -> bool:
    """Tell whether `save` wrote a file of weights beside a model."""
    return path.with_name(path.name + DATA).is_file()


def file_size_bytes(path: Path) -> int:
    """Give the size of a model's file, with the file of weights beside it; 0 where there is none."""
    return sum(file.stat().st_size for file in (path, path.with_name(path.name + DATA)) if file.is_file())


def load(path: Path, is_mapped: bool = False) -> onnx.ModelProto:
    """Read a model; the weights of a large one stay in their file.

    Args:
        path: of the model.
        is_mapped: leave the weights of a small one in files, too: those of `outside`, where they lie in the model.

    Raises:
        ConfigError: it is no ONNX model, or its weights do not lie in its folder.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ConfigError(f"{path}: not an ONNX file, or cut off ({error}); make it again") from error
    folder = path.parent.resolve()
    for tensor in filter(is_external, model.graph.initializer):
        location, offset, length = place(tensor)
        file = (folder / location).resolve()
        if not file.is_relative_to(folder) or not file.is_file() or file.stat().st_size < offset + length:
            raise ConfigError(f"{path}: the weights of {tensor.name} are not in {location} beside it; fetch both again")
        _point(tensor, str(file), offset, length)
    if is_mapped:
        return moved_outside(model)
    return model if is_large(model) else inlined(model)


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model with its weights in it; the given one is changed."""
    for tensor in filter(is_external, model.graph.initializer):
        tensor.raw_data = array(tensor).tobytes()
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def save(model: onnx.ModelProto, path: Path, is_split: bool = False) -> None:
    """Write one self-contained file, or a large model's weights in a file beside it, one after the other.

    Equal models give equal bytes. The model is left as it is, but for the weights of a small one, which it takes in.

    Args:
        model: with its weights in it, or in files.
        path: of the model.
        is_split: write the weights of a small one into a file beside it, too.

    Raises:
        StorageFailed: the disk refuses.
    """
    with storage_errors(f"writing {path}"):
        if not is_split and not is_large(model):
            with replacing(path) as partial:
                partial.write_bytes(inlined(model).SerializeToString(deterministic=True))
            return
        written = bare(model)
        del written.graph.input[:]
        written.graph.input.extend(model.graph.input)
        data = path.with_name(path.name + DATA)
        digest = hashlib.sha256()
        with replacing(data) as partial, partial.open("wb") as file:
            for tensor in model.graph.initializer:
                if _is_kept(tensor):
                    written.graph.initializer.append(_append(tensor, file, digest, data.name))
        written.metadata_props.extend(item for item in model.metadata_props if item.key != DIGEST)
        written.metadata_props.add(key=DIGEST, value=digest.hexdigest())
        with replacing(path) as partial:
            partial.write_bytes(written.SerializeToString(deterministic=True))


def _is_kept(tensor: TensorProto) -> bool:
    return is_external(tensor) or len(tensor.raw_data) >= KEPT_BYTES


def _append(tensor: TensorProto, file: Any, digest: Any, name: str) -> TensorProto:
    """Write one weight at the next page, and give an initializer that names the place."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    offset = file.tell()
    values = np.ascontiguousarray(array(tensor)).reshape(-1).view(np.uint8)
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].data
        file.write(chunk)
        digest.update(chunk)
    made = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    _point(made, name, offset, len(values))
    return made


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model whose large weights are inputs: checking and inferring shapes need no values of theirs."""
    large = [tensor for tensor in model.graph.initializer if _is_kept(tensor)]
    inputs = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in large]
    graph = helper.make_graph(
        model.graph.node, model.graph.name, [*model.graph.input, *inputs], model.graph.output,
        [tensor for tensor in model.graph.initializer if not _is_kept(tensor)], value_info=model.graph.value_info,
    )  # fmt: skip
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version,
        producer_name=model.producer_name, producer_version=model.producer_version,
    )  # fmt: skip


def from_root(model: onnx.ModelProto) -> bytes:
    """Serialise a model whose weights lie in files, named relative to the root folder: ONNX Runtime takes no others."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in filter(is_external, made.graph.initializer):
        location, offset, length = place(tensor)
        file = Path(location)
        _point(tensor, str(file.relative_to(file.anchor)), offset, length)
    return bytes(made.SerializeToString())


@contextlib.contextmanager
def outside(folder: Path) -> Iterator[None]:
    """Write arrays of 1 MB and more that become weights in this context to files of a folder, removed at its end."""
    with storage_errors(f"making {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)
        shutil.rmtree(folder, ignore_errors=True)


def open_folder() -> Path | None:
    """Give the folder of the innermost `outside` that is open, or None."""
    return _folder.get()


@contextlib.contextmanager
def passing() -> Iterator[None]:
    """Remove, at the end of this context, the files that `outside` got in it, where weights go to files at all."""
    folder = _folder.get()
    if folder is None:
        yield
        return
    with outside(Path(tempfile.mkdtemp(dir=folder))):
        yield


def tensor_of(values: NDArray[Any], name: str) -> ir.TensorProtocol:
    """Make an initializer's tensor, in memory or, where it is large and `outside` is open, in a file."""
    path = _written(values)
    if path is None:
        return ir.Tensor(np.asarray(values, order="C"), name=name)
    return ir.ExternalTensor(
        path, 0, values.nbytes, ir.DataType.from_numpy(values.dtype), shape=ir.Shape(values.shape), name=name
    )


def mapped(values: NDArray[Any]) -> NDArray[Any]:
    """Give the same array, mapped from a file where it is large and `outside` is open."""
    path = _written(values)
    return values if path is None else np.memmap(path, values.dtype, "r", 0, values.shape)


def _written(values: NDArray[Any]) -> str | None:
    folder = _folder.get()
    if folder is None or values.nbytes < KEPT_BYTES:
        return None
    with storage_errors(f"writing {folder}"), tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        np.ascontiguousarray(values).tofile(file)
    return file.name


def serialized(model: ir.Model) -> onnx.ModelProto:
    """Turn `onnx_ir` into protobuf; large weights go to files first if `outside` is open."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes >= KEPT_BYTES:
            value.const_value = tensor_of(value.const_value.numpy(), str(value.name))
    return ir.to_proto(model)


def put_outside(model: onnx.ModelProto, folder: Path, least_bytes: int) -> onnx.ModelProto:
    """Give a model whose weights of at least so many bytes lie in a folder: copying it then costs little.

    The given model loses them.
    """
    for tensor in model.graph.initializer:
        if not is_external(tensor) and len(tensor.raw_data) >= least_bytes:
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(tensor.raw_data)
            _point(tensor, file.name, 0, len(tensor.raw_data))
            tensor.ClearField("raw_data")
    return model


def moved_outside(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model whose large weights lie in files, where `outside` is open; the given model loses them."""
    folder = _folder.get()
    if folder is None:
        return model if is_large(model) else inlined(model)
    with storage_errors(f"writing {folder}"):
        return put_outside(model, folder, KEPT_BYTES)
