"""Check files of unknown origin: names that stay in their folder, bounded sizes, strict JSON, confined ONNX."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from edgeq.errors import ConfigError

_LONGEST_NAME, _LONGEST_PART = 1024, 255
_CONTEXT_KEYS = ("ep_cache_context",)  # where a node of a compiled model names its binary
_ADVICE = "Fetch it again, from where you trust it."


def unsafe_name(name: str) -> str | None:
    """Say why a file's name is refused, or give None: it must be printable, relative, and stay below its folder."""
    if not name or len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
        return f"whose name has not 1 to {_LONGEST_NAME} bytes"
    if not name.isprintable() or "\\" in name or ":" in name:
        return "whose name holds a backslash, a colon or what cannot be printed"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "which could lie outside of it: absolute, `.` or `..`"
    if any(len(part.encode()) > _LONGEST_PART for part in parts):
        return f"whose name has a part of more than {_LONGEST_PART} bytes"
    return None


def oversize(path: Path, most_bytes: int) -> str | None:
    """Say why a file is refused as too large or no plain file, or give None, also where it does not exist.

    A pipe or a device may never end, and a file of many gigabytes fills the memory.
    """
    if not path.exists():
        return None
    if not path.is_file():
        return "is no plain file"
    size = path.stat().st_size
    return f"has {size:,} bytes; at most {most_bytes:,} are read" if size > most_bytes else None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; refuse NaN, infinity, numbers that overflow to it, lone surrogates and nesting without end.

    Raises:
        json.JSONDecodeError: the text is not such JSON.
    """
    said = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        found = json.loads(said, parse_constant=_refuse_constant)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a UnicodeEncodeError is a ValueError
        raise json.JSONDecodeError(f"{type(error).__name__}: {error}", said[:100], 0) from error
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def require_confined(path: Path) -> None:
    """Refuse an ONNX file that makes its runtime read files outside of its own folder.

    Raises:
        ConfigError: it does so, or it is no ONNX file.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as ONNX ({error}). {_ADVICE}") from error
    except Exception as error:  # the boundary to protobuf, whose DecodeError is defined in several modules
        raise ConfigError(f"{path}: no ONNX file, or cut off ({error}). {_ADVICE}") from error
    for name in _external_files(model):
        file = path.parent / name
        reason = unsafe_name(name)
        if reason is None and not file.resolve().is_relative_to(path.parent.resolve()):
            reason = "which is a link to outside of it"
        if reason is not None:
            raise ConfigError(f"{path}: asks for a file {name[:100]!r} beside it, {reason}. {_ADVICE}")


def _external_files(model: onnx.ModelProto) -> tuple[str, ...]:
    """Name the external files of an ONNX model: of weights in every graph and function, and of compiled binaries."""
    found: set[str] = set()
    for nodes, tensors in _scopes(model):
        for tensor in tensors:
            found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
        for node in nodes:
            found |= {
                attribute.s.decode("utf-8", "replace") for attribute in node.attribute
                if attribute.name in _CONTEXT_KEYS and len(attribute.s) < _LONGEST_NAME and _is_path(node)
            }  # fmt: skip
    return tuple(sorted(found))


def _is_path(node: onnx.NodeProto) -> bool:
    """Tell whether a compiled node's context attribute is a file name, not the binary itself."""
    embeds = next((attribute.i for attribute in node.attribute if attribute.name == "embed_mode"), 1)
    return embeds == 0


def _scopes(model: onnx.ModelProto) -> Iterator[tuple[Iterable[onnx.NodeProto], list[onnx.TensorProto]]]:
    """Give the nodes and stored tensors of each graph and function, nested ones included."""
    graphs = [model.graph]
    bodies: list[Iterable[onnx.NodeProto]] = [function.node for function in model.functions]
    while graphs or bodies:
        tensors: list[onnx.TensorProto] = []
        nodes: Iterable[onnx.NodeProto]
        if graphs:
            graph = graphs.pop()
            nodes = graph.node
            tensors += graph.initializer
            for sparse in graph.sparse_initializer:
                tensors += [sparse.values, sparse.indices]
        else:
            nodes = bodies.pop()
        for node in nodes:
            for attribute in node.attribute:
                graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
                tensors += [attribute.t, *attribute.tensors] if attribute.HasField("t") else attribute.tensors
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    tensors += [sparse.values, sparse.indices]
        yield nodes, tensors
