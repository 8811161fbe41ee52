"""Read a compiled file: which operators are left to the host, and for which NPU its commands are.

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

ON_NPU = "ethos-u"  # the custom operator that holds everything the NPU runs
_MAGIC, _CONFIGURE = b"COP1", 0x01
_PRODUCTS = {0: "ethos-u55", 1: "ethos-u65", 2: "ethos-u85"}


@dataclass(frozen=True)
class Finished:
    """Hold what a compiled file says of itself: the NPU, and name and output of each operator left to the host."""

    accelerator: str
    on_host: tuple[tuple[str, str], ...]
    on_npu: dict[str, int]  # operators of the source file that are in the NPU's commands


def read(data: bytes, source: bytes, name: str) -> Finished:
    """Read a compiled file and hold its inputs and output against the file it was made from.

    Args:
        data: the compiled file.
        source: the file that was compiled.
        name: who messages speak of.

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
        if code.customCode == ON_NPU.encode():
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
    """Give the NPU that a command stream configures: product and multiplications in a cycle."""
    if stream[:4] != _MAGIC or len(stream) < 12:
        raise LoweringFailed(f"{name}: the commands begin with {stream[:4]!r}; {_MAGIC!r} is needed. Pin ethos-u-vela.")
    action, configuration = struct.unpack_from("<II", stream, 4)
    product = _PRODUCTS.get(configuration >> 28)
    if action & 0xFF != _CONFIGURE or product is None:
        raise LoweringFailed(f"{name}: the commands configure an unknown NPU ({configuration:#x}). Pin ethos-u-vela.")
    return f"{product}-{1 << (configuration & 0xF)}"


def _ports(model: schema.ModelT) -> list[tuple[object, ...]]:
    """Give name, shape, dtype and codes of what the one signature takes and gives."""
    (signature,) = model.signatureDefs
    graph = model.subgraphs[signature.subgraphIndex]
    found: list[tuple[object, ...]] = []
    for port in [*signature.inputs, *signature.outputs]:
        tensor = graph.tensors[port.tensorIndex]
        codes = tensor.quantization
        is_coded = codes is not None and codes.scale is not None
        parameters = (codes.scale.tolist(), codes.zeroPoint.tolist()) if is_coded else None
        found.append((port.name.decode(), np.atleast_1d(tensor.shape).tolist(), tensor.type, parameters))
    return sorted(found, key=lambda port: str(port[0]))
