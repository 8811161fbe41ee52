"""Read an OpenVINO IR (.xml with its .bin) without OpenVINO: layers, ports, constants.

Source: OpenVINO 2026.4, documentation, "Model representation: Intermediate Representation", version 11.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from edgeq.errors import ConfigError
from edgeq.system.untrusted import oversize

_DTYPES = {
    "fp64": "float64", "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "bf16": "bfloat16",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "i4": "int4",
    "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8", "u4": "uint4", "boolean": "bool",
}  # fmt: skip
_MOST_BYTES = 256 << 20
_ADVICE = "Export it again, or check that the download is complete."

_SINKS = ("Result", "Assign")  # operations that may have no output

# Operations between a product and the 8-bit tensor that it reads.
_DEQUANTISING = frozenset({"Subtract", "Multiply", "Reshape", "Transpose", "Convert"})
_EIGHT_BITS = frozenset({"int8", "uint8"})


@dataclass(frozen=True)
class OutputPort:
    """Hold the dtype, shape and tensor names of a layer's output; -1 is a dynamic dimension."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """Hold one operation; `inputs` are pairs of a layer's id and the position of one of its outputs."""

    name: str
    operation: str
    opset: str
    attributes: Mapping[str, str]
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[OutputPort, ...]


@dataclass(frozen=True)
class Network:
    """Hold the layers of an IR by their ids, in the order of the file."""

    version: int
    layers: Mapping[str, Layer]

    def of(self, operation: str) -> Iterator[Layer]:
        """Give the layers of one operation."""
        return (layer for layer in self.layers.values() if layer.operation == operation)

    def port(self, source: tuple[str, int]) -> OutputPort:
        """Give the output that an input reads."""
        return self.layers[source[0]].outputs[source[1]]

    def computed(self) -> dict[str, Counter[str]]:
        """Count operations by the dtypes they compute on: inputs of the output's dtype, seen through dequantisation."""
        counts: dict[str, Counter[str]] = {}
        for layer in self.layers.values():
            if layer.operation in ("Const", "Parameter", "Result") or not layer.outputs:
                continue
            result = layer.outputs[0].dtype
            alike = [source for source in layer.inputs if self.port(source).dtype == result]
            seen = [self.dtype_read(source) for source in alike or layer.inputs[:1]]
            if layer.operation in _DEQUANTISING:
                seen = [self.port(source).dtype for source in layer.inputs[:1]]
            counts.setdefault(layer.operation, Counter())[" x ".join(dict.fromkeys(seen)) or result] += 1
        return counts

    def dtype_read(self, source: tuple[str, int]) -> str:
        """Give the dtype of an input; for a dequantised one that of its 8-bit source."""
        layer, position = self.layers[source[0]], source[1]
        seen = layer
        for _ in self.layers:  # bounds the loop: a damaged file may have a cycle
            if seen.operation not in _DEQUANTISING or not seen.inputs:
                break
            origin, port = seen.inputs[0]
            dtype = self.layers[origin].outputs[port].dtype
            if seen.operation == "Convert":
                return dtype if dtype in _EIGHT_BITS else layer.outputs[position].dtype
            seen = self.layers[origin]
        return layer.outputs[position].dtype

    def is_integer_product(self, layer: Layer) -> bool:
        """Tell whether a layer is a MatMul of two 8-bit tensors."""
        return layer.operation == "MatMul" and all(self.dtype_read(source) in _EIGHT_BITS for source in layer.inputs)


class _Reader:
    """Collect layers and edges from expat's events."""

    def __init__(self) -> None:
        self.version = 0
        self.layers: dict[str, dict[str, str]] = {}
        self.attributes: dict[str, dict[str, str]] = {}
        self.ports: dict[str, dict[str, OutputPort]] = {}
        self.edges: dict[str, dict[int, tuple[str, str]]] = {}
        self._layer = ""
        self._port: dict[str, str] = {}
        self._shape: list[int] = []
        self._text = ""
        self._is_output = False
        self._depth = 0  # of <layers> and <edges>: a body of If or Loop holds another network

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Handle an opening tag."""
        self._text = ""
        if tag == "net":
            self._depth += 1
            self.version = int(attributes["version"])
        elif self._depth > 1:
            return
        elif tag == "layer":
            self._layer = attributes["id"]
            self.layers[self._layer], self.attributes[self._layer] = attributes, {}
            self.ports[self._layer] = {}
        elif tag == "data" and self._layer:
            self.attributes[self._layer] = attributes
        elif tag in ("input", "output"):
            self._is_output = tag == "output"
        elif tag == "port":
            self._port, self._shape = attributes, []
        elif tag == "edge":
            port = int(attributes["to-port"])
            self.edges.setdefault(attributes["to-layer"], {})[port] = attributes["from-layer"], attributes["from-port"]

    def end(self, tag: str) -> None:
        """Handle a closing tag."""
        if tag == "net":
            self._depth -= 1
        elif self._depth > 1:
            return
        elif tag == "dim":
            self._shape.append(int(self._text))
        elif tag == "port" and self._is_output:
            names = tuple(filter(None, self._port.get("names", "").split(",")))
            port = OutputPort(_dtype(self._port["precision"]), tuple(self._shape), names)
            self.ports[self._layer][self._port["id"]] = port
        elif tag == "layer":
            self._layer = ""

    def text(self, data: str) -> None:
        """Handle text between tags."""
        self._text += data

    def network(self) -> Network:
        """Make the network from the collected layers, ports and edges."""
        positions = {key: list(ports) for key, ports in self.ports.items()}
        layers: dict[str, Layer] = {}
        for key, tag in self.layers.items():
            edges = [edge for _, edge in sorted(self.edges.get(key, {}).items())]
            inputs = tuple((origin, positions[origin].index(port)) for origin, port in edges)
            outputs = tuple(self.ports[key].values())
            layers[key] = Layer(tag["name"], tag["type"], tag["version"], self.attributes[key], inputs, outputs)
        return Network(self.version, layers)


def read_ir(path: Path) -> Network:
    """Read the .xml of an IR; a document type, which could define entities, is refused.

    Raises:
        ConfigError: the file is missing, no XML, or no IR.
    """

    def refuse(*_: object) -> None:
        raise ConfigError(f"{path}: has a document type, which no IR needs and which can hide entities. {_ADVICE}")

    reason = oversize(path, _MOST_BYTES)
    if reason is not None:
        raise ConfigError(f"{path}: {reason}; an IR's .xml is needed. {_ADVICE}")
    reader, parser = _Reader(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler = reader.text
    try:
        parser.Parse(path.read_bytes(), True)
        network = reader.network()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); an IR's .xml is needed. {_ADVICE}") from error
    except (expat.ExpatError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: not a readable OpenVINO IR ({_reason(error)}). {_ADVICE}") from error
    bare = [layer.name for layer in network.layers.values() if not layer.outputs and layer.operation not in _SINKS]
    if bare:
        raise ConfigError(f"{path}: {bare[0]} gives nothing; an output is needed. {_ADVICE}")
    if not network.version or not network.layers:
        raise ConfigError(f"{path}: no <net> with layers, which an OpenVINO IR has. {_ADVICE}")
    return network


def weights_of(path: Path) -> Path:
    """Give the path of an IR's .bin: of the same name, or the one that the IRs of all buckets share.

    Raises:
        ConfigError: neither exists.
    """
    shared = path.with_name(re.sub(r"_seq_\d+$", "_seq", path.stem) + ".bin")
    for weights in (path.with_suffix(".bin"), shared):
        if weights.is_file():
            return weights
    raise ConfigError(f"{path.with_suffix('.bin')}: is not there; an IR is an .xml and its .bin. {_ADVICE}")


def stored(network: Network, weights: Path) -> Iterator[tuple[Layer, OutputPort, int]]:
    """Give each constant of the .bin, with its size in bytes.

    Raises:
        ConfigError: a constant lies beyond the end of the file.
    """
    end = weights.stat().st_size
    for layer in network.of("Const"):
        offset, size = (int(layer.attributes[key]) for key in ("offset", "size"))
        if offset + size > end:
            raise ConfigError(
                f"{weights}: has {end} bytes; {layer.name} lies at {offset} and has {size} bytes. {_ADVICE}"
            )
        yield layer, layer.outputs[0], size


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _dtype(precision: str) -> str:
    """Give numpy's name of an IR's precision."""
    return _DTYPES.get(precision.lower(), precision.lower())
