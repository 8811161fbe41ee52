"""Trace a torch module with torch.export and write it as ONNX, with the user's line for each node and each refusal."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx

from edgeq.errors import Unsupported
from edgeq.frontend.torch.errors import explain
from edgeq.graph import external_data, origins

if TYPE_CHECKING:
    import torch

_OPSET = 21


def trace(
    graph: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    name: str,
    max_sequence: int = 65536,
) -> onnx.ModelProto:
    """Trace a module whose inputs are tensors to ONNX; each node keeps a sentence about the user's line it comes from.

    Args:
        graph: its `forward` has a parameter for each tensor, in their order, or one *parameter.
        tensors: input name -> an example: [batch, sequence], both axes of which become symbolic, or images, whose batch
            axis does.
        outputs: the names of the outputs.
        name: for messages.
        max_sequence: the longest sequence; not used for images.

    Returns:
        The graph; the weights of a large one are where `external_data.outside` puts them.

    Raises:
        Unsupported: torch cannot trace it; the message names the line.
    """
    import torch

    batch, sequence = torch.export.Dim("batch", min=1, max=65536), torch.export.Dim("sequence", min=2, max=max_sequence)
    axes: tuple[object, ...] = tuple(
        {0: batch, 1: sequence} if tensor.ndim == 2 else {0: batch} for tensor in tensors.values()
    )
    is_open = any(item.kind is item.VAR_POSITIONAL for item in inspect.signature(graph.forward).parameters.values())
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                graph,
                tuple(tensors.values()),
                dynamo=True,
                opset_version=_OPSET,
                input_names=list(tensors),
                output_names=list(outputs),
                dynamic_shapes=(axes,) if is_open else axes,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the boundary to the exporter, which may raise anything

        def line(node: str) -> str:
            return _line_of(graph, tuple(tensors.values()), (axes,) if is_open else axes, node)

        raise Unsupported(f"{name}: torch cannot export this model: {explain(error, line)}") from error
    if program is None:
        raise Unsupported(f"{name}: torch.onnx.export gave no program")
    proto = external_data.serialized(program.model)
    proto.producer_name, proto.producer_version = "edgeq", ""
    origins.keep(proto)
    return proto


def _line_of(graph: torch.nn.Module, tensors: tuple[torch.Tensor, ...], shapes: Any, node: str) -> str:
    """Trace the module again without strict mode, and give the user's line of a node, or an empty string."""
    import torch

    try:
        with torch.no_grad(), quiet():
            traced = torch.export.export(graph, tensors, dynamic_shapes=shapes, strict=False).run_decompositions()
    except Exception:  # the boundary to the exporter, which may raise anything; the refusal then has no line
        return ""
    return next(
        (origins.user_line(str(item.meta.get("stack_trace", ""))) for item in traced.graph.nodes if item.name == node),
        "",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's prints, log lines and warnings."""
    root = logging.getLogger("torch")
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
