"""Measure what quantising each weight product costs: promote one product at a time, and many together.

A product is promoted by taking QuantizeLinear and DequantizeLinear away around it in the QDQ model, which runs in ONNX
Runtime: no model is quantised again. In a scheme that leaves nothing float its weights stay int8, because promoted
means 16-bit activations there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeq.calibration.observe import equal_length_batches
from edgeq.data.sessions import Embeddings, embed_batches, unit
from edgeq.data.tokens import Tokens
from edgeq.errors import EdgeqError
from edgeq.graph.float_session import FloatSession
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import Record, Scheme
from edgeq.system.progress import Progress

_TAIL = 0.1  # of the texts: the worst tenth counts as much as all of them
_PRODUCTS = ("Gemm", "MatMul")
_CODERS = ("QuantizeLinear", "DequantizeLinear")


class Quality(Record):
    """Hold cosines of vectors with FP32's."""

    cosine_mean: float
    cosine_tail: float  # mean over the worst tenth of the texts
    cosine_min: float

    @property
    def score(self) -> float:
        """Give the score for ranking: the average of the mean over all texts and the mean over the worst tenth."""
        return (self.cosine_mean + self.cosine_tail) / 2.0


class Product(Record):
    """Hold the quality with one weight product alone promoted."""

    name: str
    channels: int  # of its input
    outputs: int
    quality: Quality
    gain: float  # of the score


class Step(Record):
    """Hold the quality with the best products promoted together."""

    promoted: int
    added: tuple[str, ...]
    quality: Quality


class Sensitivity(Record):
    """Hold the products of one QDQ model, the most costly first."""

    scheme: str
    texts: int
    base: Quality
    products: tuple[Product, ...]
    steps: tuple[Step, ...]


def measure(
    float_model: onnx.ModelProto, qdq_model: onnx.ModelProto, scheme: Scheme, names: Sequence[str], tokens: Tokens,
    progress: Progress,
) -> Sensitivity:  # fmt: skip
    """Promote each product alone, rank them, then promote 1, 2, 4, ... and all of them together.

    Args:
        float_model: FP32, whose tensors the scheme puts codes on (`edgeq.analysis.layer_errors.counterpart`).
        qdq_model: made from it.
        scheme: of the QDQ model.
        names: of its integer products.
        tokens: of the texts that are compared.
        progress: called as `progress(stage, done, total)`.

    Raises:
        EdgeqError: a product is not in the models, or no vector comes out.
    """
    batches = equal_length_batches(tokens, max(len(ids) for ids in tokens.ids))

    keeps_float = QUANTIZERS[scheme.kind].keeps_float

    def embed(model: onnx.ModelProto) -> Embeddings:
        return embed_batches(FloatSession.of(model, optimize=keeps_float), batches, len(tokens.ids))

    reference = embed_batches(FloatSession.of(float_model), batches, len(tokens.ids))
    base = _quality(reference, embed(qdq_model))
    weights = _weights(float_model) if keeps_float else None
    found = []
    for done, name in enumerate(names):
        progress("sensitivity", done, len(names))
        quality = _quality(reference, embed(promoted(qdq_model, (name,), weights)))
        channels, outputs = _shape(float_model, name)
        found.append(
            Product(name=name, channels=channels, outputs=outputs, quality=quality, gain=quality.score - base.score)
        )
    ranked = sorted(found, key=lambda item: (-item.gain, item.name))
    steps, before = [], 0
    counts = [2**power for power in range(len(ranked).bit_length()) if 2**power < len(ranked)]
    for count in [*counts, len(ranked)]:
        chosen = [item.name for item in ranked[:count]]
        quality = _quality(reference, embed(promoted(qdq_model, chosen, weights)))
        steps.append(Step(promoted=count, added=tuple(chosen[before:]), quality=quality))
        before = count
    progress("sensitivity", len(names), len(names))
    return Sensitivity(scheme=scheme.name, texts=len(tokens.ids), base=base, products=tuple(ranked), steps=tuple(steps))


def promoted(
    model: onnx.ModelProto, names: Sequence[str], weights: dict[str, NDArray[np.float32]] | None
) -> onnx.ModelProto:
    """Give the QDQ model without QuantizeLinear and DequantizeLinear around some products.

    Args:
        model: not changed.
        names: of MatMul or Gemm nodes.
        weights: float32 weights by product, which replace the codes; None keeps the codes of weights.

    Raises:
        EdgeqError: a product is not there.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    made = {output: node for node in graph.node for output in node.output}
    products = {node.name: node for node in graph.node if node.op_type in _PRODUCTS and node.name in set(names)}
    missing = sorted(set(names) - set(products))
    if missing:
        raise EdgeqError(f"the QDQ model has no product named {', '.join(missing)}")
    for name, node in products.items():
        node.input[0] = _uncoded(made, node.input[0])
        if weights is not None:
            weight = numpy_helper.from_array(weights[name], f"{name}/promoted")
            graph.initializer.append(weight)
            node.input[1] = weight.name
        _uncode_result(graph, node)
    return changed


def _uncoded(made: dict[str, onnx.NodeProto], name: str) -> str:
    """Give the tensor before one or more pairs of QuantizeLinear and DequantizeLinear."""
    while name in made and made[name].op_type in _CODERS and made[name].input[0] in made:
        name = made[name].input[0]
    return name


def _uncode_result(graph: onnx.GraphProto, product: onnx.NodeProto) -> None:
    """Connect the readers of a product's (and its bias's) dequantised result to the float result."""
    value = product.output[0]
    reading = [node for node in graph.node if value in node.input]
    if len(reading) == 1 and reading[0].op_type == "Add":
        value = reading[0].output[0]
        reading = [node for node in graph.node if value in node.input]
    if len(reading) != 1 or reading[0].op_type != "QuantizeLinear":
        return
    codes = reading[0].output[0]
    dequantized = [node.output[0] for node in graph.node if codes in node.input and node.op_type == "DequantizeLinear"]
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in dequantized:
                node.input[position] = value


def _weights(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.name: numpy_helper.to_array(stored[node.input[1]])
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }


def _shape(model: onnx.ModelProto, name: str) -> tuple[int, int]:
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    node = next((node for node in model.graph.node if node.name == name), None)
    if node is None or len(dims.get(node.input[1], ())) != 2:
        raise EdgeqError(f"the float model has no weight product named {name}")
    channels, outputs = dims[node.input[1]]
    return channels, outputs


def _quality(reference: Embeddings, embeddings: Embeddings) -> Quality:
    cosines = np.sort(np.sum(unit(reference) * unit(embeddings), axis=1))
    worst = cosines[: max(1, round(len(cosines) * _TAIL))]
    return Quality(cosine_mean=float(cosines.mean()), cosine_tail=float(worst.mean()), cosine_min=float(cosines.min()))
