"""Append pooling, Dense layers and L2 normalisation to token vectors in a graph, and do the same in numpy.

The numpy form is the reference for the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.onnx.find import MODULES, read_json
from edgeq.graph import roles
from edgeq.graph.edit import add_constant, required
from edgeq.graph.roles import Role
from edgeq.passes.finite_fill import FILL
from edgeq.passes.pool_by_matmul import POOLING

FloatArray = NDArray[np.float32]

# A flag of 1_Pooling/config.json -> its mode; sentence-transformers 6 writes the mode instead of flags.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {"Identity": "", "Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid"}
_LEAST_COUNT, _LEAST_LENGTH = 1e-9, 1e-12


@dataclass(frozen=True)
class Dense:
    """Hold a Dense layer.

    Attributes:
        weight: float32[in, out].
        bias: float32[out], or None.
        activation: the ONNX operator of the activation, or "".
    """

    weight: FloatArray
    bias: FloatArray | None
    activation: str


@dataclass(frozen=True)
class Head:
    """Hold the modules behind the token vectors: concatenated pooling modes, Dense layers, L2 normalisation."""

    modes: tuple[str, ...]
    dense: tuple[Dense, ...]
    normalize: bool

    @property
    def modules(self) -> tuple[str, ...]:
        """Name the modules as a source record does."""
        pooling = (f"Pooling:{'+'.join(self.modes)}",) if self.modes else ()
        return (*pooling, *("Dense" for _ in self.dense), *(("Normalize",) if self.normalize else ()))


def read_head(folder: Path) -> Head:
    """Read the modules behind the transformer from a sentence-transformers folder, without torch.

    Raises:
        ConfigError: a file is missing, or not as sentence-transformers writes it.
        Unsupported: a module, its activation or the order of modules is not supported.
    """
    modes: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalize = False
    for entry in read_json(folder / MODULES):
        kind, path = str(entry["type"]).rsplit(".", 1)[-1], folder / str(entry["path"])
        if kind == "Pooling":
            modes = _modes(path / "config.json")
        elif kind == "Dense":
            dense.append(_dense(path))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise Unsupported(
                f"{folder / MODULES}: has a module {kind}, which edgeq cannot put behind an ONNX file; "
                "export the sentence-transformers model itself"
            )
        if dense and not modes or (normalize and kind == "Dense"):
            raise Unsupported(f"{folder / MODULES}: has its modules in an order that edgeq does not know")
    return Head(modes, tuple(dense), normalize)


def _modes(path: Path) -> tuple[str, ...]:
    config = read_json(path)
    if not config.get("include_prompt", True):
        raise Unsupported(f"{path}: leaves the prompt out of pooling (include_prompt is false), which a graph cannot")
    given = config.get("pooling_mode")
    if given is not None:
        return (given,) if isinstance(given, str) else tuple(str(item) for item in given)
    modes = tuple(mode for flag, mode in FLAGS.items() if config.get(flag))
    if not modes:
        raise ConfigError(f"{path}: names no pooling mode that edgeq knows; one of {', '.join(FLAGS)} must be true")
    return modes


def _dense(folder: Path) -> Dense:
    config, weights = read_json(folder / "config.json"), folder / "model.safetensors"
    try:
        from safetensors.numpy import load_file

        tensors = load_file(weights)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{weights}: a Dense layer's weights cannot be read ({error}); safetensors and the file are needed: "
            "pip install 'edgeq[onnx]'"
        ) from error
    name = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise Unsupported(f"{folder}: its activation {name} is none of {', '.join(_ACTIVATIONS)}")
    bias = tensors.get("linear.bias")
    weight = np.ascontiguousarray(tensors["linear.weight"].T, dtype=np.float32)
    return Dense(weight, None if bias is None else bias.astype(np.float32), _ACTIVATIONS[name])


def apply_head(head: Head, hidden: FloatArray, mask: NDArray[np.int64]) -> FloatArray:
    """Pool, project and normalise token vectors in numpy, to float32[batch, dim].

    Args:
        head: the modules.
        hidden: float32[batch, sequence, width].
        mask: int64[batch, sequence].
    """
    x = np.concatenate([_pooled(mode, hidden, mask) for mode in head.modes], axis=1)
    for layer in head.dense:
        x = x @ layer.weight + (0.0 if layer.bias is None else layer.bias)
        if layer.activation == "Tanh":
            x = np.tanh(x)
        elif layer.activation == "Relu":
            x = np.maximum(x, 0.0)
        elif layer.activation == "Sigmoid":
            x = 1.0 / (1.0 + np.exp(-x))
    return normalized(x) if head.normalize else x.astype(np.float32)


def normalized(vectors: FloatArray) -> FloatArray:
    """L2-normalise vectors, float32[batch, dim]."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _LEAST_LENGTH)
    return np.asarray(vectors / lengths, np.float32)


def _pooled(mode: str, hidden: FloatArray, mask: NDArray[np.int64]) -> FloatArray:
    weights = mask[:, :, None].astype(np.float32)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return np.asarray(np.where(weights > 0, hidden, -np.inf).max(axis=1), np.float32)
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        return np.asarray(hidden[np.arange(len(hidden)), last])
    if mode == "weightedmean":
        weights = weights * np.cumsum(mask, axis=1)[:, :, None]
    count = np.maximum(weights.sum(axis=1), _LEAST_COUNT)
    divisor = np.sqrt(count) if mode == "mean_sqrt_len_tokens" else count
    return np.asarray((hidden * weights).sum(axis=1) / divisor, np.float32)


class HeadWriter:
    """Append a head to token vectors, as nodes in the patterns that the passes recognise."""

    def __init__(self, graph: ir.Graph, hidden: ir.Value, mask: ir.Value) -> None:
        """Append to `hidden`, float32[batch, sequence, width], pooled under `mask`, int64[batch, sequence]."""
        self._graph, self._hidden, self._mask = graph, hidden, mask
        self._axis = self._put("head/axis", np.array([1], np.int64))

    def write(self, head: Head) -> ir.Value:
        """Write all modules of a head, and return the vectors, float32[batch, dim]."""
        pooled = [self._pool(mode) for mode in head.modes]
        x = pooled[0] if len(pooled) == 1 else self._add("Concat", pooled, "head/modes", axis=1)
        for row, layer in enumerate(head.dense):
            name = f"dense.{row}"
            x = self._add("MatMul", [x, self._put(f"{name}.weight", layer.weight)], f"{name}.product")
            if layer.bias is not None:
                x = self._add("Add", [x, self._put(f"{name}.bias", layer.bias)], f"{name}.sum")
            if layer.activation:
                x = self._add(layer.activation, [x], f"{name}/activation")
        return self.unit(x) if head.normalize else x

    def unit(self, x: ir.Value) -> ir.Value:
        """Write the L2 normalisation of float32[batch, dim]."""
        length = self._add("ReduceL2", [x, self._axis], "head/length", keepdims=1)
        least = self._put("head/least_length", np.array(_LEAST_LENGTH, np.float32))
        return self._add("Div", [x, self._add("Clip", [length, least], "head/divisor")], "head/unit")

    def _pool(self, mode: str) -> ir.Value:
        if mode == "cls":
            return self._add("Gather", [self._hidden, self._put("head/first", np.array(0))], "head/cls", axis=1)
        if mode == "max":
            return self._largest()
        if mode == "lasttoken":
            return self._last()
        whole = self._mask
        if mode == "weightedmean":
            seen = self._add("CumSum", [self._mask, self._put("head/cumulated", np.array(1))], f"head/{mode}_seen")
            whole = self._add("Mul", [seen, self._mask], f"head/{mode}_positions")
        two = self._put("head/column", np.array([2], np.int64))
        column = self._add("Unsqueeze", [whole, two], f"head/{mode}_column")
        weights = self._add("Cast", [column], f"head/{mode}_mask", to=int(ir.DataType.FLOAT))
        masked = self._add("Mul", [self._hidden, weights], f"head/{mode}_masked")
        total = self._add("ReduceSum", [masked, self._axis], f"head/{mode}_total", keepdims=0)
        count = self._add("ReduceSum", [weights, self._axis], f"head/{mode}_count", keepdims=0)
        least = self._put("head/least_count", np.array(_LEAST_COUNT, np.float32))
        number = self._add("Clip", [count, least], f"head/{mode}_number")
        if mode == "mean_sqrt_len_tokens":
            number = self._add("Sqrt", [number], f"head/{mode}_root")
        return self._add("Div", [total, number], f"head/{mode}")

    def _largest(self) -> ir.Value:
        column = self._add(
            "Unsqueeze", [self._mask, self._put("head/column", np.array([2], np.int64))], "head/max_column"
        )
        is_padding = self._add("Equal", [column, self._put("head/zero", np.array(0, np.int64))], "head/is_padding")
        fill = self._put("head/fill", np.array(FILL, np.float32))
        filled = self._add("Where", [is_padding, fill, self._hidden], "head/filled")
        return self._add("ReduceMax", [filled, self._axis], "head/max", keepdims=0)

    def _last(self) -> ir.Value:
        """Write last-token pooling as a MatMul with a row that is 1 at the last token and 0 elsewhere."""
        seen = self._add("CumSum", [self._mask, self._put("head/cumulated", np.array(1))], "head/seen")
        count = self._add("ReduceSum", [self._mask, self._axis], "head/tokens", keepdims=1)
        is_last = self._add("Equal", [seen, count], "head/is_last_or_padding")
        whole = self._add("Cast", [is_last], "head/last_or_padding", to=int(ir.DataType.INT64))
        last = self._add("Mul", [whole, self._mask], "head/last")
        weights = self._add("Cast", [last], "head/shares", to=int(ir.DataType.FLOAT))
        row = self._add("Unsqueeze", [weights, self._axis], f"{POOLING}/weights")
        picked = self._add("MatMul", [row, self._hidden], f"{POOLING}/picked")
        roles.give(required(picked.producer()), Role.POOLING, Role.PICKED_TOKEN)
        return self._add("Squeeze", [picked, self._axis], "head/lasttoken")

    def _put(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        known = self._graph.initializers.get(name)
        return known if known is not None else add_constant(self._graph, name, array)

    def _add(self, op_type: str, inputs: list[ir.Value], name: str, **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=name)  # type: ignore[arg-type]
        node.outputs[0].name = name
        self._graph.append(node)
        return node.outputs[0]
