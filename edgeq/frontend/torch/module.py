"""Write a torch module that the caller holds as an ONNX file, proved against it; the file is then an ONNX source."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.data.batches import PIXELS
from edgeq.errors import ConfigError, EdgeqError, Unsupported
from edgeq.frontend.onnx.foreign_inputs import IDS, MASK, SEGMENTS
from edgeq.frontend.onnx.interface import EMBEDDING, HIDDEN
from edgeq.frontend.torch.errors import explain
from edgeq.frontend.torch.trace import trace
from edgeq.graph import double_precision, external_data, float_noise

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5  # float rounding between torch and ONNX Runtime, of the largest value
_HALF_TOLERANCE = 2e-2  # the same where the module computes in half precision
_KEYS = (EMBEDDING, HIDDEN, "token_embeddings")  # of outputs that are mappings, in the order of trying


def write_onnx(
    module: torch.nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | None, folder: Path, max_sequence: int
) -> Path:
    """Write FOLDER/CLASS.onnx and give its path.

    Args:
        module: from token ids and mask, each int64[batch, sequence], to sentence embeddings or token vectors.
        example_inputs: tensors in the order of `forward`, or by name; None makes ids, mask and token types, as far as
            `forward` has parameters of those names.
        folder: an existing one.
        max_sequence: the longest sequence in tokens.

    Raises:
        ConfigError: the example inputs do not fit `forward`.
        Unsupported: torch cannot run or trace the module; the message names the line.
        EdgeqError: the graph's output differs from the module's.
    """
    import torch

    name = type(module).__name__
    tensors = _tensors(module, example_inputs)

    class Graph(torch.nn.Module):
        """Call the module by parameter names, and select its vectors."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return _selected(self.module(**dict(zip(tensors, values, strict=True))), name)

    with _evaluating(module):
        try:
            with torch.no_grad():
                expected = Graph()(*tensors.values())
        except EdgeqError:
            raise
        except Exception as error:  # the boundary to the caller's module, which may raise anything
            raise Unsupported(f"{name}: running it on the example inputs failed: {explain(error)}") from error
        if expected.ndim not in (2, 3):
            raise Unsupported(
                f"{name}: gives {list(expected.shape)}; vectors [batch, dim] or token vectors [batch, sequence, dim] "
                "are needed. Wrap it in a module that gives one of them."
            )
        output = EMBEDDING if expected.ndim == 2 else HIDDEN
        path = folder / f"{name}.onnx"
        with external_data.outside(folder / "weights"):
            external_data.save(trace(Graph().eval(), tensors, (output,), name, max_sequence), path)
    _prove(path, tensors, expected, name)
    return path


def _tensors(
    module: torch.nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | None
) -> dict[str, torch.Tensor]:
    """Name the example inputs after the parameters of `forward`."""
    import torch

    parameters = list(inspect.signature(module.forward).parameters)
    if isinstance(example_inputs, Mapping):
        named = dict(example_inputs)
    elif example_inputs is not None:
        named = dict(zip(parameters, example_inputs, strict=False))
        if len(named) != len(example_inputs):
            raise ConfigError(
                f"{type(module).__name__}: {len(example_inputs)} example inputs for forward({', '.join(parameters)})"
            )
    else:
        ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 0]])
        made = {IDS: ids, MASK: (ids > 0).to(torch.int64), SEGMENTS: torch.zeros_like(ids)}
        named = {key: value for key, value in made.items() if key in parameters}
        if PIXELS in parameters:
            raise ConfigError(
                f"{type(module).__name__}: forward({', '.join(parameters)}) takes images; "
                "modules come in for texts only. Save the model and its image processor with save_pretrained, and give "
                "the directory and images="
            )
        if IDS not in named:
            raise ConfigError(
                f"{type(module).__name__}: forward({', '.join(parameters)}) has no parameter {IDS}; give example_inputs"
            )
    for key, value in named.items():
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or value.is_floating_point():
            raise ConfigError(f"example_inputs: {key} is no tensor of whole numbers, [batch, sequence]")
        if value.shape[0] < 2 or value.shape[1] < 3:
            raise ConfigError(f"example_inputs: {key} is {list(value.shape)}; at least 2 texts of 3 tokens are needed")
    return named


def _selected(output: Any, name: str) -> torch.Tensor:
    """Select the vectors or token vectors from a module's output: a tensor, a mapping or a tuple."""
    import torch

    if isinstance(output, Mapping):
        found = next((output[key] for key in _KEYS if key in output), None)
        found = next(iter(output.values())) if found is None else found
    else:
        found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, torch.Tensor):
        raise Unsupported(f"{name}: gives a {type(found).__name__}; a tensor, or a mapping or tuple of them, is needed")
    return found


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode (no dropout), and restore its mode afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _prove(path: Path, tensors: Mapping[str, torch.Tensor], expected: torch.Tensor, name: str) -> None:
    """Compare the output of ONNX Runtime on the example inputs with torch's.

    Raises:
        EdgeqError: they differ by more than float rounding.
    """
    import onnxruntime as ort
    import torch

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kept = {item.name for item in session.get_inputs()}  # an input that nothing reads is not in the graph
    (found,) = session.run(None, {key: value.numpy() for key, value in tensors.items() if key in kept})
    wanted = expected.to(torch.float32).numpy()
    error = float(np.abs(found.astype(np.float32) - wanted).max() / max(1.0, float(np.abs(wanted).max())))
    if error <= TOLERANCE:
        return
    is_half = expected.dtype != torch.float32
    noise = 0.0 if is_half else _noise(path, {key: tensors[key].numpy() for key in kept}, found)
    allowed = _HALF_TOLERANCE if is_half else float_noise.allowed(noise, TOLERANCE)
    if not error <= allowed:
        raise EdgeqError(
            f"{name}: the exported graph differs from the module by {error:.2e}; at most {allowed:.1e} is allowed, "
            f"where the graph's own FP32 differs from its FP64 by {noise:.1e}. "
            "Does its forward do the same each time? Else this is a defect of torch's exporter: please report it"
        )


def _noise(path: Path, arrays: Mapping[str, NDArray[Any]], found: NDArray[np.float32]) -> float:
    """Give how far a graph's FP32 output is from FP64, as its error is measured; 0 where FP64 cannot be computed."""
    try:
        (exact,) = double_precision.outputs(external_data.load(path), arrays).values()
    except Unsupported:
        return 0.0
    return float(np.abs(found - exact).max() / max(1.0, float(np.abs(exact).max())))
