"""The two-layer encoder, quantised for an integer-only scheme, and what its .tflite file is held against."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import encoder
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeq import targets
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import QdqModel, Target
from edgeq.system.files import file_ref

BUCKETS = (8, 16, 48)
TOKENS = Tokens(encoder.tokens(3, 40), 0, 0)
# What lowering adds between: the same codes in another shape, the mask before it is scaled, the share of a token.
_ADDED = (
    "/rows",
    "/column",
    "/flat",
    "/shaped",
    "/mask",
    "/table",
    "/16bit/inverse",
    "/one_over_count",
    "/16bit/count",
    "/16bit/root",
)


class Meant(NamedTuple):
    """What the codes of a tensor mean: one scale and zero point, or one of each for each slice."""

    dtype: str
    scale: NDArray[np.float32]
    zero_point: NDArray[np.integer[Any]]


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@functools.cache
def calibrated() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


def make_model(scheme_name: str, folder: Path) -> QdqModel:
    """Write the QDQ model into a folder."""
    scheme, observed = SCHEMES[scheme_name], calibrated()
    proto, integer, floats = quantize.quantize(observed.model, observed.statistics, scheme)
    path = folder / "qdq.onnx"
    onnx.save(proto, path)
    return QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=scheme,
        inputs=("input_ids", "attention_mask"), outputs=("sentence_embedding",), dim=encoder.DIM,
        max_sequence=encoder.LONGEST, integer_matmuls=integer, float_matmuls=floats,
    )  # fmt: skip


def with_wrong_scale(model: QdqModel, tensor: str, factor: float, path: Path) -> QdqModel:
    """Write the QDQ model again, with one tensor's scale multiplied."""
    proto = onnx.load(model.file.path)
    scale = next(stored for stored in proto.graph.initializer if stored.name == f"{tensor}/scale")
    scale.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(scale) * factor).astype(np.float32), scale.name))
    onnx.save(proto, path)
    return model.model_copy(update={"file": file_ref(path)})


def make_target(scheme: str, **runtime: object) -> Target:
    found = targets.load_target("integer-only-w8a16")
    return found.model_copy(
        update={"scheme": scheme, "buckets_tokens": BUCKETS, "runtime": {**found.runtime, **runtime}}
    )


def cosines(first: Embeddings, second: Embeddings) -> NDArray[np.float64]:
    return np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def mirror(model: QdqModel, tokens: Tokens = TOKENS) -> Embeddings:
    """Run the QDQ model itself in ONNX Runtime, without optimisation."""
    return embed_batches(FloatSession.of(Path(model.file.path), optimize=False), batches(tokens), len(tokens.ids))


def meant(model: QdqModel) -> dict[str, Meant]:
    """Give the codes that the QDQ model means, under the names that lowering gives its tensors."""
    proto = onnx.load(model.file.path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found: dict[str, Meant] = {}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = stored[node.input[1]].reshape(-1)
        codes = stored[node.input[2] if len(node.input) > 2 else node.input[0]]  # a bias has no zero point
        zero_point = codes.reshape(-1) if len(node.input) > 2 else np.zeros(scale.shape, codes.dtype)
        name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        found[name.removesuffix("/quantized")] = Meant(str(codes.dtype), scale, zero_point)
    for node in proto.graph.node:
        if node.op_type == "Gather" and node.output[0] in found:
            found[node.input[0]] = found[node.output[0]]
    return found


def is_added(name: str) -> bool:
    """Say whether lowering added a tensor that the QDQ model does not have."""
    return name.endswith(_ADDED) or name.startswith(("ones_", "attention_mask/", "inverses_")) or name.isdecimal()
