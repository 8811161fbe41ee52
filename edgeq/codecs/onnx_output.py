"""Append an output of codes to an ONNX model: int8 by one scale, or packed sign bits, beside the float vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.codecs.codec import Codec
from edgeq.errors import ConfigError

OUTPUT = "sentence_codes"
_VECTOR = "sentence_embedding"
_PREFIX = "codes/"
_HELD = ("int8", "binary")


def add_code_output(model: onnx.ModelProto, codec: Codec) -> None:
    """Append Gather, Div, Round, Clip and Cast (int8), or Gather, Greater, MatMul and Cast (binary), to a model.

    The new output `sentence_codes` is int8[batch, live] or uint8[batch, bytes], the codes of `Codec.encode`; the float
    output stays. An application that reads the codes alone never sees a float.

    Args:
        model: with the output `sentence_embedding`, float32[batch, dim]; changed in place.
        codec: `int8` or `binary`, without a reduction.

    Raises:
        ConfigError: the codec is another, the model lacks the output, or has codes already.
    """
    if codec.name.text not in _HELD:
        raise ConfigError(f"codec {codec.name.text}: an output of a model gives {' or '.join(_HELD)}. Choose one.")
    outputs = {output.name: output for output in model.graph.output}
    if _VECTOR not in outputs or OUTPUT in outputs:
        raise ConfigError(
            f"the model's outputs are {', '.join(outputs)}; {_VECTOR} alone is needed to add {OUTPUT} to."
        )
    dim = outputs[_VECTOR].type.tensor_type.shape.dim[-1].dim_value
    if dim not in (0, codec.dim):
        raise ConfigError(f"codec {codec.name.text}: takes {codec.dim} dimensions, and the model gives {dim}.")
    batch = outputs[_VECTOR].type.tensor_type.shape.dim[0]
    kept = codec.arrays["kept"].astype(np.int64)
    _constant(model, "kept", kept)
    nodes = [_node("Gather", [_VECTOR, f"{_PREFIX}kept"], "live", axis=1)]
    if codec.name.text == "int8":
        nodes += _int8(model, codec)
        dtype, width = TensorProto.INT8, len(kept)
    else:
        nodes += _bits(model, len(kept), codec.size_bytes)
        dtype, width = TensorProto.UINT8, codec.size_bytes
    nodes[-1].output[0] = OUTPUT
    model.graph.node.extend(nodes)
    rows = batch.dim_param or batch.dim_value or "batch"
    model.graph.output.append(helper.make_tensor_value_info(OUTPUT, dtype, [rows, width]))


def _int8(model: onnx.ModelProto, codec: Codec) -> list[onnx.NodeProto]:
    """Divide by the scale, round half to even, clip at +-127."""
    _constant(model, "scale", codec.arrays["scale"].astype(np.float32))
    _constant(model, "least", np.array(-127, np.float32))
    _constant(model, "most", np.array(127, np.float32))
    return [
        _node("Div", [f"{_PREFIX}live", f"{_PREFIX}scale"], "steps"),
        _node("Round", [f"{_PREFIX}steps"], "rounded"),
        _node("Clip", [f"{_PREFIX}rounded", f"{_PREFIX}least", f"{_PREFIX}most"], "clipped"),
        _node("Cast", [f"{_PREFIX}clipped"], "int8", to=TensorProto.INT8),
    ]


def _bits(model: onnx.ModelProto, width: int, size: int) -> list[onnx.NodeProto]:
    """Compare with 0, and sum the bits of each byte by a product with powers of 2, which float32 holds exactly."""
    powers = np.zeros((width, size), np.float32)
    powers[np.arange(width), np.arange(width) // 8] = 2.0 ** (7 - np.arange(width) % 8)
    _constant(model, "powers", powers)
    _constant(model, "zero", np.array(0, np.float32))
    return [
        _node("Greater", [f"{_PREFIX}live", f"{_PREFIX}zero"], "positive"),
        _node("Cast", [f"{_PREFIX}positive"], "ones", to=TensorProto.FLOAT),
        _node("MatMul", [f"{_PREFIX}ones", f"{_PREFIX}powers"], "sums"),
        _node("Cast", [f"{_PREFIX}sums"], "bytes", to=TensorProto.UINT8),
    ]


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [f"{_PREFIX}{output}"], f"{_PREFIX}{output}", **attributes)


def _constant(model: onnx.ModelProto, name: str, value: NDArray[np.generic]) -> None:
    model.graph.initializer.append(numpy_helper.from_array(value, f"{_PREFIX}{name}"))
