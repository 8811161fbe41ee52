"""Read a file compiled by Vela: its host operators, and the NPU that its command stream configures.

Source: ethos-u-vela 5.2.0, `ethosu/vela/driver_actions.py` (command stream), `tflite_writer.py` (custom operator).
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeq.backends.tflite import kernels
from edgeq.errors import LoweringFailed

_ON_NPU = "ethos-u"  # Vela's custom operator, which holds the NPU's command stream
_MAGIC, _CONFIGURE = b"COP1", 0x01
_PRODUCTS = {0: "ethos-u55", 1: "ethos-u65", 2: "ethos-u85"}


@dataclass(frozen=True)
class Finished:
    """Hold the NPU of a compiled file, and the name and output of each operator left to the host."""

    accelerator: str
    on_host: tuple[tuple[str, str], ...]
    on_npu: dict[str, int]  # operators of the source file that the NPU runs, counted by name


def read(data: bytes, source: bytes, name: str) -> Finished:
    """Read a compiled file, and compare its inputs and output with its source file's.

    Args:
        data: the compiled file.
        source: the file that was compiled.
        name: begins messages.

    Raises:
        LoweringFailed: nothing of it runs on the NPU, its commands cannot be read, or its inputs or output changed.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    before = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(source, 0))
    if _ports(model) != _ports(before):
        raise LoweringFailed(f"{name}: inputs and output are {_ports(model)} behind Vela; they were {_ports(before)}")
    graph = model.subgraphs[0]
    accelerators, on_host = set(), []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        if code.customCode == _ON_NPU.encode():
            stream = model.buffers[graph.tensors[operator.inputs[0]].buffer].data
            accelerators.add(_accelerator(bytes(np.asarray(stream, np.uint8)), name))
            continue
        output = graph.tensors[operator.outputs[0]].name.decode()
        on_host.append((kernels.operator_name(code), output))
    if len(accelerators) != 1:
        raise LoweringFailed(f"{name}: the compiled file holds commands for {sorted(accelerators) or 'no NPU at all'}")
    outputs = {output for _, output in on_host}
    counts = Counter(item.name for item in kernels.read(source).operators if item.output not in outputs)
    return Finished(accelerators.pop(), tuple(on_host), dict(sorted(counts.items())))


def _accelerator(stream: bytes, name: str) -> str:
    """Read the NPU from a command stream: product, and multiply-accumulates per cycle."""
    if stream[:4] != _MAGIC or len(stream) < 12:
        raise LoweringFailed(f"{name}: the commands begin with {stream[:4]!r}; {_MAGIC!r} is needed. Pin ethos-u-vela.")
    action, configuration = struct.unpack_from("<II", stream, 4)
    product = _PRODUCTS.get(configuration >> 28)
    if action & 0xFF != _CONFIGURE or product is None:
        raise LoweringFailed(f"{name}: the commands configure an unknown NPU ({configuration:#x}). Pin ethos-u-vela.")
    return f"{product}-{1 << (configuration & 0xF)}"


def _ports(model: schema.ModelT) -> list[tuple[object, ...]]:
    """Give name, shape, dtype and quantisation parameters of the one signature's inputs and outputs."""
    (signature,) = model.signatureDefs
    graph = model.subgraphs[signature.subgraphIndex]
    found: list[tuple[object, ...]] = []
    for port in [*signature.inputs, *signature.outputs]:
        tensor = graph.tensors[port.tensorIndex]
        stored = tensor.quantization
        is_quantized = stored is not None and stored.scale is not None
        params = (stored.scale.tolist(), stored.zeroPoint.tolist()) if is_quantized else None
        found.append((port.name.decode(), np.atleast_1d(tensor.shape).tolist(), tensor.type, params))
    return sorted(found, key=lambda port: str(port[0]))
