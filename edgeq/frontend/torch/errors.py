"""Explain in one sentence why torch could not trace a model, at which line, and what to do, instead of a traceback."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import PurePath

from edgeq.graph.origins import user_line

_LONGEST = 300
_NODE = re.compile(r"translating node %(?P<name>\w+)")
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnx_ir", "edgeq")

# Words in torch's message -> what to do.
_WAYS_OUT = (
    (
        ("data-dependent", "Could not guard", "unbacked", "GuardOnDataDependent", "Dynamic control flow"),
        "The model decides by the values of its tensors, which a graph cannot: write torch.where instead of if, and "
        "keep numbers in tensors instead of .item().",
    ),
    (
        ("No ONNX function found", "No decompositions registered", "DispatchError", "UnsupportedOperator", "fake impl"),
        "No backend has that operator: write the line with torch's own, or export the ONNX file yourself "
        "(torch.onnx.export with custom_translation_table) and give it to edgeq as the model.",
    ),
    (
        ("Constraints violated", "ConstraintViolation", "dynamic shapes", "specialized", "_dynamic"),
        "The model fixes the batch or the length of a text: take sizes from the tensor's shape, not from "
        "numbers, and give the longest text that it takes as max_sequence.",
    ),
    (
        ("graph break", "Unsupported: ", "torch._dynamo.exc.Unsupported", "call_function", "skip"),
        "torch.export cannot trace that line: write it with torch's operators alone.",
    ),
)
_ANYWAY = "Export the ONNX file yourself, and give it to edgeq as the model."


def explain(error: BaseException, lines: Callable[[str], str] | None = None) -> str:
    """Explain an exception that torch raised: the reason, the user's line and the way out.

    Args:
        error: the exception.
        lines: gives the user's line of a node of the traced graph by the node's name, for messages that name only that.
    """
    chain = _chain(error)
    whole = "\n".join(f"{type(item).__name__}: {item}" for item in chain)
    way_out = next((text for marks, text in _WAYS_OUT if any(mark in whole for mark in marks)), _ANYWAY)
    node = _NODE.search(whole)
    where = lines(node["name"]) if lines is not None and node is not None else _where(chain, whole)
    return f"{_reason(chain)}{f' (at {where})' if where else ''}. {way_out}"


def _chain(error: BaseException) -> list[BaseException]:
    """List an exception and its causes, the innermost last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _reason(chain: list[BaseException]) -> str:
    """Give the first line of text of the innermost exception that has one."""
    for item in reversed(chain):
        for line in str(item).splitlines():
            said = re.sub(r"\s+", " ", line).strip().rstrip(".")
            if said and not said.startswith(("Traceback", "File ", "(", "#")):
                return f"{type(item).__name__}: {_bare(said)[:_LONGEST]}"
    return type(chain[-1]).__name__


def _bare(text: str) -> str:
    """Remove the folders from the paths in a message."""
    return re.sub(r"(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", text)


def _where(chain: list[BaseException], whole: str) -> str:
    """Find the innermost line of the user's own code in torch's message or the tracebacks."""
    if "from user code" in whole:
        found = user_line(whole.split("from user code", 1)[1])
        if found:
            return found
    for item in reversed(chain):
        frames = [frame for frame in traceback.extract_tb(item.__traceback__) if not _is_library(frame.filename)]
        if frames:
            last = frames[-1]
            code = f" `{last.line.strip()}`" if last.line else ""
            return f"{PurePath(last.filename).name} line {last.lineno}{code}"
    return user_line(whole)


def _is_library(filename: str) -> bool:
    parts = PurePath(filename).parts
    return filename.startswith("<") or any(name in parts for name in _LIBRARIES)
