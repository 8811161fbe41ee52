"""Read SoC, versions, inputs and outputs of a QNN context binary through QAIRT's libQnnSystem.

Source: QAIRT 2.51, include/QNN: QnnSystemInterface.h, System/QnnSystemContext.h (binary info, version 3), QnnTypes.h.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_BINARY_INFO_VERSION = 3  # earlier versions do not name the SoC
_DTYPES = {
    0x0032: "int32", 0x0064: "int64", 0x0108: "uint8", 0x0116: "uint16", 0x0216: "float16", 0x0232: "float32",
    0x0408: "uint8 codes", 0x0416: "uint16 codes",
}  # fmt: skip
_SCALE_OFFSET = 0  # QNN_QUANTIZATION_ENCODING_SCALE_OFFSET


class _Version(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("major", "minor", "patch")]

    def text(self) -> str:
        """Format the version as 1.2.3."""
        return f"{self.major}.{self.minor}.{self.patch}"


class _ScaleOffset(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_float), ("offset", ctypes.c_int32)]


class _Quantization(ctypes.Structure):
    _fields_ = [
        ("definition", ctypes.c_uint32),
        ("encoding", ctypes.c_uint32),
        ("scale_offset", _ScaleOffset),  # the first of a union of 32 bytes
        ("rest_of_union", ctypes.c_uint64 * 3),
    ]


class _TensorFields(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_uint32),
        ("layout", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
        ("quantization", _Quantization),
        ("rank", ctypes.c_uint32),
        ("dimensions", ctypes.POINTER(ctypes.c_uint32)),
        ("memory", ctypes.c_uint32),
        ("buffer", ctypes.c_void_p),
        ("buffer_size", ctypes.c_uint32),
        ("dynamic_dimensions", ctypes.c_void_p),
        ("sparse", ctypes.c_uint32 * 3),
        ("is_produced", ctypes.c_uint8),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("fields", _TensorFields)]


class _GraphFields(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("inputs_count", ctypes.c_uint32),
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs_count", ctypes.c_uint32),
        ("outputs", ctypes.POINTER(_Tensor)),
    ]


class _Graph(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("fields", _GraphFields)]


class _BinaryFields(ctypes.Structure):
    _fields_ = [
        ("backend", ctypes.c_uint32),
        ("build", ctypes.c_char_p),
        ("core_api", _Version),
        ("backend_api", _Version),
        ("soc_version", ctypes.c_char_p),
        ("blob_version", _Version),
        ("blob_size", ctypes.c_uint64),
        ("context_tensors_count", ctypes.c_uint32),
        ("context_tensors", ctypes.c_void_p),
        ("graphs_count", ctypes.c_uint32),
        ("graphs", ctypes.POINTER(_Graph)),
        ("platform", ctypes.c_void_p),
        ("metadata_size", ctypes.c_uint32),
        ("metadata", ctypes.c_void_p),
        ("soc_model", ctypes.c_uint32),
    ]


class _Binary(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("fields", _BinaryFields)]


class _Interface(ctypes.Structure):
    _fields_ = [
        ("backend", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("version", _Version),
        ("create", ctypes.c_void_p),
        ("get_binary_info", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    ]


_Create = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p))
_GetInfo = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64,
    ctypes.POINTER(ctypes.POINTER(_Binary)), ctypes.POINTER(ctypes.c_uint64),
)  # fmt: skip
_Free = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)


def context_info(library: Path, binary: Path) -> dict[str, Any]:
    """Give SoC, build and API versions, and the first graph's inputs and outputs.

    Args:
        library: libQnnSystem.so.
        binary: the context binary.

    Raises:
        ValueError: the library does not know the file, or describes it in another version.
        OSError: the library or the file cannot be read.
    """
    system = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    providers, count = ctypes.POINTER(ctypes.POINTER(_Interface))(), ctypes.c_uint32()
    system.QnnSystemInterface_getProviders.restype = ctypes.c_uint64
    status = system.QnnSystemInterface_getProviders(ctypes.byref(providers), ctypes.byref(count))
    if status or not count.value:
        raise ValueError(f"{library.name} gives no interface (status {status:#x})")
    interface = providers[0].contents
    handle = ctypes.c_void_p()
    status = _Create(interface.create)(ctypes.byref(handle))
    if status:
        raise ValueError(f"{library.name} makes no context (status {status:#x})")
    content = binary.read_bytes()
    buffer = ctypes.create_string_buffer(content, len(content))
    found, size = ctypes.POINTER(_Binary)(), ctypes.c_uint64()
    try:
        status = _GetInfo(interface.get_binary_info)(
            handle, buffer, len(content), ctypes.byref(found), ctypes.byref(size)
        )
        if status:
            raise ValueError(f"{binary.name} is no context binary that QAIRT can describe (status {status:#x})")
        if found.contents.version != _BINARY_INFO_VERSION:
            raise ValueError(f"{binary.name}: described in version {found.contents.version}; 3 is needed")
        return _described(found.contents.fields)
    finally:
        _Free(interface.free)(handle)


def _described(fields: _BinaryFields) -> dict[str, Any]:
    # Only the first graph: the next one lies behind fields that newer versions add. edgeq's binaries have one graph.
    graph = fields.graphs[0].fields if fields.graphs_count else None
    return {
        "soc_model": int(fields.soc_model),
        "build": fields.build.decode(),
        "core_api": fields.core_api.text(),
        "backend_api": fields.backend_api.text(),
        "blob_version": fields.blob_version.text(),
        "graphs": int(fields.graphs_count),
        "inputs": [_tensor(graph.inputs[i]) for i in range(graph.inputs_count)] if graph is not None else [],
        "outputs": [_tensor(graph.outputs[i]) for i in range(graph.outputs_count)] if graph is not None else [],
    }


def _tensor(tensor: _Tensor) -> dict[str, Any]:
    fields = tensor.fields
    quantization = fields.quantization
    is_coded = quantization.definition == 1 and quantization.encoding == _SCALE_OFFSET
    return {
        "name": fields.name.decode(),
        "dtype": _DTYPES.get(fields.dtype, hex(fields.dtype)),
        "shape": [int(fields.dimensions[i]) for i in range(fields.rank)],
        "scale": float(quantization.scale_offset.scale) if is_coded else None,
        "zero_point": -int(quantization.scale_offset.offset) if is_coded else None,  # QNN adds an offset, ONNX takes it
    }
