"""Measure what the activation codes of each weight product cost, in one session over a few short texts.

Each product of the QDQ model gets a switch that lets it read and give the numbers before QuantizeLinear. Weights keep
their codes. With all switches but one open, the vectors move by what that one product's codes cost; no model is
quantised or loaded again. Products that read one tensor share a switch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from pydantic import Field

from edgeq.data.batches import AnyFeeds, Batch, Samples
from edgeq.data.sessions import Embeddings, embed_batches, unit
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import Tokens
from edgeq.errors import EdgeqError
from edgeq.graph.float_session import FloatSession
from edgeq.quantization import schemes
from edgeq.records import Record, Scheme
from edgeq.system.progress import Progress

PROBED, PROBED_TOKENS, _GROUPS = 8, 32, 2
SWITCHES = "promoted_products"  # float32[groups], an input of the model with switches: 1 is open, 0 is coded
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_CODERS = ("QuantizeLinear", "DequantizeLinear")


class Site(Record):
    """Hold what the codes of the weight products that read one tensor cost: 1 - the mean cosine of centred vectors."""

    names: tuple[str, ...]
    channels: int  # of the tensor; of a convolution all that one number is summed from
    outputs: int  # of all its products
    loss: float
    is_convolution: bool = Field(default=False, exclude_if=lambda found: not found)


class Step(Record):
    """Hold the loss with the products of the most costly sites promoted together."""

    promoted: int  # sites
    added: tuple[str, ...]
    loss: float


class Sensitivity(Record):
    """Hold the products of one QDQ model by what they read, the most costly first.

    Attributes:
        loss: of the QDQ model as it is, against FP32.
        rest: with all products promoted: of weights, tables, norms and whatever else has codes.
    """

    scheme: str
    texts: int
    loss: float
    rest: float
    sites: tuple[Site, ...]
    steps: tuple[Step, ...]

    def share_left(self, promoted: Iterable[Site]) -> float:
        """Estimate the share of the loss that stays when these sites are promoted: losses add up."""
        whole = sum(item.loss for item in self.sites)
        if not self.loss > self.rest or not whole:
            return 1.0
        left = 1.0 - sum(item.loss for item in promoted) / whole
        return (self.rest + (self.loss - self.rest) * left) / self.loss


def measure(
    float_model: onnx.ModelProto, qdq_model: onnx.ModelProto, scheme: Scheme, names: Sequence[str], samples: Samples,
    progress: Progress,
) -> Sensitivity:  # fmt: skip
    """Rank products by what their codes cost, and promote 1, 2, 4, ... and all of them together.

    Args:
        float_model: FP32, whose tensors the scheme puts codes on (`edgeq.analysis.layer_errors.counterpart`).
        qdq_model: made from it.
        scheme: of the QDQ model.
        names: of its integer products.
        samples: texts or images to choose some from.
        progress: called as `progress(stage, done, total)`.

    Raises:
        EdgeqError: a product is not in the QDQ model, or no vector comes out.
    """
    batches = probes(samples)
    texts = sum(len(batch.rows) for batch in batches)
    groups = _by_tensor(qdq_model, names)
    session = FloatSession.of(with_switches(qdq_model, groups), optimize=False)

    def embed(promoted: Iterable[int]) -> Embeddings:
        switches = np.zeros(len(groups) + 1, np.float32)
        switches[list(promoted)] = 1.0
        return embed_batches(
            session, [Batch(batch.rows, SwitchedFeeds(batch.feeds, switches)) for batch in batches], texts
        )

    reference = embed_batches(FloatSession.of(float_model), batches, texts)
    every = range(len(groups))
    convolutions = {node.name for node in qdq_model.graph.node if node.op_type == "Conv"}
    if schemes.promotes_convolutions(scheme):
        convolutions = set()
    opened = embed([*every, len(groups)])  # weights and tables alone have codes: other roundings would hide one site's
    found = []
    for done, group in enumerate(groups):
        progress("sensitivity", done, len(groups))
        vectors = embed(row for row in range(len(groups) + 1) if row != done)
        shapes = [_shape(qdq_model, name) for name in group]
        found.append(
            Site(
                names=group,
                channels=shapes[0][0],
                outputs=sum(shape[1] for shape in shapes),
                loss=loss(reference, opened, vectors),
                is_convolution=any(name in convolutions for name in group),
            )
        )
    ranked = sorted(found, key=lambda item: (-item.loss, item.names))
    order = [groups.index(item.names) for item in ranked]
    steps, before = [], 0
    counts = [2**power for power in range(len(ranked).bit_length()) if 2**power < len(ranked)]
    for count in [*counts, len(ranked)]:
        added = tuple(name for item in ranked[before:count] for name in item.names)
        left = loss(reference, reference, embed(order[:count]))
        steps.append(Step(promoted=count, added=added, loss=left))
        before = count
    progress("sensitivity", len(groups), len(groups))
    return Sensitivity(
        scheme=scheme.name,
        texts=texts,
        loss=loss(reference, reference, embed(())),
        rest=loss(reference, reference, embed(every)),
        sites=tuple(ranked),
        steps=tuple(steps),
    )


def probes(samples: Samples) -> list[Batch]:
    """Choose eight texts of evenly spaced lengths, and cut them so that four at a time are equally long.

    Args:
        samples: any texts; or images, of which eight are taken as they are.

    Returns:
        Batches without padding, of at most 32 tokens a text.
    """
    if not isinstance(samples, Tokens):
        return samples.chosen(evenly_spaced(len(samples), PROBED)).batches(PROBED // _GROUPS, samples.longest * PROBED)
    by_length = sorted(range(len(samples)), key=lambda row: (len(samples.ids[row]), row))
    chosen = [samples.ids[by_length[place]] for place in evenly_spaced(len(samples), PROBED)]
    cut: list[tuple[int, ...]] = []
    for part in np.array_split(np.arange(len(chosen)), min(_GROUPS, len(chosen))):
        size = min(PROBED_TOKENS, *(len(chosen[row]) for row in part))
        cut += [(*chosen[row][: size - 1], chosen[row][-1]) for row in part]
    return Tokens(tuple(cut), 0, samples.pad_id).unpadded(PROBED_TOKENS * PROBED)


@dataclass(frozen=True)
class SwitchedFeeds:
    """Hold the input arrays of one batch, and which groups of products are promoted, float32[groups]."""

    feeds: AnyFeeds
    switches: NDArray[np.float32]

    @property
    def size(self) -> int:
        """Count as the batch does."""
        return self.feeds.size

    def named(self, inputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Map the names of graph inputs to arrays."""
        return {**self.feeds.named([name for name in inputs if name != SWITCHES]), SWITCHES: self.switches}


def loss(reference: Embeddings, one: Embeddings, other: Embeddings) -> float:
    """Give 1 - the mean cosine of two sets of vectors, each less the mean of the reference."""
    mean = unit(reference).mean(axis=0)
    first, second = (unit(unit(rows) - mean) for rows in (one, other))
    return float(1.0 - np.sum(first * second, axis=1).mean())


def _by_tensor(model: onnx.ModelProto, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Group products that read one tensor: their errors are alike, and cancel in part, as those of queries and keys."""
    made = {output: node for node in model.graph.node for output in node.output}
    read = {node.name: _uncoded(made, node.input[0]) for node in model.graph.node if node.op_type in _PRODUCTS}
    missing = sorted(set(names) - set(read))
    if missing:
        raise EdgeqError(f"the QDQ model has no product named {', '.join(missing)}")
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(read[name], []).append(name)
    return [tuple(group) for group in groups.values()]


def with_switches(model: onnx.ModelProto, groups: Sequence[Sequence[str]]) -> onnx.ModelProto:
    """Let the products of each group read and give numbers without codes, where its switch is open.

    The last switch is for all other activations.

    Before::

        x ─ QuantizeLinear ─ DequantizeLinear ─ MatMul ─ QuantizeLinear ─ DequantizeLinear ─

    After, with s the group's switch::

        x ─┬─ QuantizeLinear ─ DequantizeLinear ─┬─ MatMul ─ (the same)
           └─ Sub(x, dequantised) ─ Mul(s) ───── Add

    Args:
        model: QDQ model; not changed.
        groups: names of MatMul or Gemm nodes that are promoted together.

    Returns:
        The model with one more input, `SWITCHES`: float32[groups + 1].
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    made = {output: node for node in graph.node for output in node.output}
    reading: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            reading.setdefault(name, []).append(node)
    switches = [f"{SWITCHES}/{place}" for place in range(len(groups) + 1)]
    graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.FLOAT, [len(switches)]))
    nodes = [helper.make_node("Gather", [SWITCHES, f"{switch}/place"], [switch]) for switch in switches]
    for place, switch in enumerate(switches):
        graph.initializer.append(numpy_helper.from_array(np.array(place, np.int64), f"{switch}/place"))
    switch_of = {name: switch for switch, group in zip(switches, groups, strict=False) for name in group}
    products = [node for node in graph.node if node.name in switch_of]
    by_result = {_coded_result(node, reading): switch_of[node.name] for node in products}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    behind: dict[str, list[onnx.NodeProto]] = {}  # blends by the coded tensor behind which they stand
    renamed: dict[str, str] = {}
    cuts: dict[str, str] = {}
    for node in graph.node:
        coder = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if coder is None or coder.op_type != "QuantizeLinear" or coder.input[0] not in made:
            continue
        (coded,) = node.output
        real, cut = coder.input[0], list[onnx.NodeProto]()
        if made[real].op_type == "Conv":  # its codes may stand for the Relu or Clip behind it
            cuts[real] = real = f"{coded}/cut"
            limits = _limits(coder, stored)
            names = [f"{real}/low", f"{real}/high"]
            graph.initializer.extend(map(numpy_helper.from_array, limits, names))
            cut = [helper.make_node("Clip", [coder.input[0], *names], [real])]
        blend = _blend(real, coded, by_result.get(coded, switches[-1]), f"{coded}/as_given")
        behind[coded], renamed[coded] = [*cut, *blend], blend[-1].output[0]
    for product in products:
        coded = product.input[0]
        if coded in renamed:
            real = _uncoded(made, coded)
            blend = _blend(cuts.get(real, real), coded, switch_of[product.name], f"{product.name}/as_read")
            behind[coded] += blend
            product.input[0] = blend[-1].output[0]
    for node in graph.node:
        nodes.append(node)
        for output in node.output:
            nodes += behind.get(output, ())
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _blend(real: str, coded: str, switch: str, stem: str) -> list[onnx.NodeProto]:
    """Give the nodes of coded + (real - coded) * switch."""
    return [
        helper.make_node("Sub", [real, coded], [f"{stem}/lost"]),
        helper.make_node("Mul", [f"{stem}/lost", switch], [f"{stem}/given_back"]),
        helper.make_node("Add", [coded, f"{stem}/given_back"], [f"{stem}/blend"]),
    ]


def _limits(coder: onnx.NodeProto, stored: Mapping[str, TensorProto]) -> tuple[NDArray[np.float32], ...]:
    """Give the smallest and the largest number that a QuantizeLinear of one scale has a code for, each float32[]."""
    scale, zero = (numpy_helper.to_array(stored[name]).reshape(()) for name in coder.input[1:3])
    codes = np.iinfo(zero.dtype)
    return tuple(np.array((float(code) - float(zero)) * float(scale), np.float32) for code in (codes.min, codes.max))


def _uncoded(made: dict[str, onnx.NodeProto], name: str) -> str:
    """Give the tensor before one or more pairs of QuantizeLinear and DequantizeLinear."""
    while name in made and made[name].op_type in _CODERS and made[name].input[0] in made:
        name = made[name].input[0]
    return name


def _coded_result(product: onnx.NodeProto, reading: Mapping[str, Sequence[onnx.NodeProto]]) -> str | None:
    """Give the dequantised result of a product and its bias; None where it gives float."""
    readers = reading.get(product.output[0], ())
    if len(readers) == 1 and readers[0].op_type == "Add":
        readers = reading.get(readers[0].output[0], ())
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return None
    decoders = [node for node in reading.get(readers[0].output[0], ()) if node.op_type == "DequantizeLinear"]
    return decoders[0].output[0] if len(decoders) == 1 else None


def _shape(model: onnx.ModelProto, name: str) -> tuple[int, int]:
    """Give the channels and outputs of a product whose weights have codes; a kernel's places count as channels."""
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    node = next(node for node in model.graph.node if node.name == name)
    weight = node.input[1]
    while weight in made:
        weight = made[weight].input[0]
    if len(dims.get(weight, ())) < 2:
        raise EdgeqError(f"{name}: reads no stored matrix of weights in the QDQ model")
    first, *others = dims[weight]
    return (math.prod(others), first) if node.op_type == "Conv" else (first, others[0])
