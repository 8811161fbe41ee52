"""Summarise an OpenVINO IR."""

from __future__ import annotations

from pathlib import Path

from edgeq.analysis.inspect.summary import ModelSummary, Port, StoredTensor, counted, grouped, largest
from edgeq.backends.openvino import ir


def summarize(path: Path) -> ModelSummary:
    """Summarise an IR from its .xml and .bin.

    Raises:
        ConfigError: it is not a readable IR, or its .bin is missing.
    """
    network, weights = ir.read_ir(path), ir.weights_of(path)
    stored = [
        StoredTensor(name=layer.name, dtype=port.dtype, shape=port.shape, size_bytes=size)
        for layer, port, size in ir.stored(network, weights)
    ]
    parameters = [(layer.name, layer.outputs[0]) for layer in network.of("Parameter")]
    results = [network.port(layer.inputs[0]) for layer in network.of("Result")]
    opsets = [layer.opset.removeprefix("opset") for layer in network.layers.values()]
    kinds = network.computed().items()
    return ModelSummary(
        file=path.name,
        size_bytes=path.stat().st_size + weights.stat().st_size,
        format="openvino",
        format_version=network.version,
        opsets={"openvino": max(int(number) for number in opsets if number.isdigit())},
        inputs=tuple(_port(name, port) for name, port in parameters),
        outputs=tuple(_port(next(iter(port.names), "?"), port) for port in results),
        signatures=(),
        operators=counted((operator, dtypes) for operator, found in kinds for dtypes in found.elements()),
        tensors=grouped(stored),
        largest=largest(stored),
        bundle_files={},
    )


def _port(name: str, port: ir.OutputPort) -> Port:
    return Port(name=name, dtype=port.dtype, shape=tuple("?" if size < 0 else size for size in port.shape))
