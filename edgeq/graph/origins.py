"""Keep, in the metadata of each node, which torch module and which line of Python it comes from, without machine paths.

torch's exporter writes a stack trace and the names of the modules around each operator. One short sentence of that
stays with the node while the graph is rewritten, so that a refusal can name the line. `strip` removes it before a file
is written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import PurePath

import onnx

KEY = "edgeq.origin"

_TRACE, _SCOPES = "pkg.torch.onnx.stack_trace", "pkg.torch.onnx.name_scopes"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>[^\n]*)')
_LIBRARIES = ("/torch/", "\\torch\\", "/onnxscript/")
_CODE_WIDTH = 80


def keep(model: onnx.ModelProto) -> None:
    """Shorten the metadata that torch's exporter wrote to one sentence for each node, and drop all other metadata."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        noted = {item.key: item.value for item in node.metadata_props}
        said = noted.get(KEY) or _sentence(noted)
        del node.metadata_props[:]
        node.doc_string = ""
        if said:
            node.metadata_props.add(key=KEY, value=said)
    for item in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def strip(model: onnx.ModelProto) -> None:
    """Drop the sentences from all nodes."""
    for node in model.graph.node:
        kept = [item for item in node.metadata_props if item.key != KEY]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def origin(node: onnx.NodeProto) -> str:
    """Give the sentence of a node, or an empty string."""
    return next((item.value for item in node.metadata_props if item.key == KEY), "")


def _sentence(noted: Mapping[str, str]) -> str:
    return ", ".join(part for part in (_module(noted.get(_SCOPES, "")), user_line(noted.get(_TRACE, ""))) if part)


def _module(scopes: str) -> str:
    """Give the innermost module's name out of the list that the exporter wrote."""
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (SyntaxError, ValueError):
        return ""
    inner = [str(name).partition(".")[2] for name in names[:-1]]  # without edgeq's own wrapper around the model
    return f"module {inner[-1]}" if inner and inner[-1] else ""


def user_line(trace: str) -> str:
    """Give the innermost line of a stack trace that is not torch's own, by its file's bare name."""
    frames = list(_FRAME.finditer(trace))
    own = [frame for frame in frames if not any(part in frame["file"] for part in _LIBRARIES)]
    if not frames:
        return ""
    frame = (own or frames)[-1]
    code = frame["code"].strip()[:_CODE_WIDTH]
    return f"{PurePath(frame['file'].replace(chr(92), '/')).name} line {frame['line']}" + (f" `{code}`" if code else "")
