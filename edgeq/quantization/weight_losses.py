"""Measure what the 8-bit weights of each product cost alone, with float activations and every other weight in float.

The float model holds both forms of each MatMul, Gemm and Conv behind an ONNX If, which runs the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeq.data.batches import Batch, Samples
from edgeq.data.sessions import embed_batches
from edgeq.errors import EdgeqError
from edgeq.graph.float_session import FloatSession
from edgeq.quantization.sensitivity import SWITCHES, SwitchedFeeds, loss, probes
from edgeq.system.progress import Progress


def measure(
    float_model: onnx.ModelProto, qdq_model: onnx.ModelProto, groups: Sequence[Sequence[str]], samples: Samples,
    progress: Progress,
) -> tuple[float, ...]:  # fmt: skip
    """Give the loss (1 - mean cosine of centred vectors) of the coded weights of each group of products.

    Args:
        float_model: FP32, whose tensors the scheme puts codes on.
        qdq_model: made from it.
        groups: names of products that keep or lose their codes together.
        samples: texts or images to choose some from, as `edgeq.quantization.sensitivity.measure` does.
        progress: called as `progress(stage, done, total)`.

    Raises:
        EdgeqError: a product is missing from a model, or its weight has no codes.
    """
    batches = probes(samples)
    texts = sum(len(batch.rows) for batch in batches)
    session = FloatSession.of(with_coded_weights(float_model, qdq_model, groups), optimize=False)
    found = []
    reference = None
    for done in range(-1, len(groups)):
        switches = np.zeros(len(groups), np.float32)
        if done >= 0:
            switches[done] = 1.0
        vectors = embed_batches(
            session, [Batch(batch.rows, SwitchedFeeds(batch.feeds, switches)) for batch in batches], texts
        )
        if reference is None:
            reference = vectors
        else:
            found.append(loss(reference, reference, vectors))
        progress("weights", done + 1, len(groups))
    return tuple(found)


def with_coded_weights(
    float_model: onnx.ModelProto, qdq_model: onnx.ModelProto, groups: Sequence[Sequence[str]]
) -> onnx.ModelProto:
    """Let the products of each group read what DequantizeLinear makes of their codes, where its switch is 1.

    Before::

        x ─ MatMul(W) ─

    After, with s the group's switch::

        x ─ If(s) { MatMul(DequantizeLinear(int8 W)) } else { MatMul(W) } ─

    Args:
        float_model: FP32; not changed.
        qdq_model: holds the codes; not changed.
        groups: names of MatMul, Gemm or Conv nodes.

    Returns:
        The float model with one more input, `SWITCHES`: float32[groups].

    Raises:
        EdgeqError: a product is missing from a model, or its weight has no codes.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(float_model)
    graph = changed.graph
    group_of = {name: place for place, group in enumerate(groups) for name in group}
    coders = _coders(qdq_model)
    missing = sorted(set(group_of) - ({node.name for node in graph.node} & set(coders)))
    if missing:
        raise EdgeqError(f"no product with stored codes is named {', '.join(missing)}")
    stored = {tensor.name: tensor for tensor in qdq_model.graph.initializer}
    graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.FLOAT, [len(groups)]))
    nodes: list[onnx.NodeProto] = []
    for place in range(len(groups)):
        condition = f"{SWITCHES}/{place}"
        graph.initializer.append(numpy_helper.from_array(np.array(place, np.int64), f"{condition}/place"))
        nodes.append(helper.make_node("Gather", [SWITCHES, f"{condition}/place"], [f"{condition}/number"]))
        nodes.append(helper.make_node("Cast", [f"{condition}/number"], [condition], to=TensorProto.BOOL))
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.name not in group_of:
            nodes.append(node)
            continue
        coder = coders[node.name]
        graph.initializer.extend(stored[name] for name in coder.input if name not in known)
        known.update(coder.input)
        nodes.append(_either(node, coder, f"{SWITCHES}/{group_of[node.name]}"))
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _coders(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Give the DequantizeLinear of each node's weight, by the node's name."""
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.name: made[node.input[1]] for node in model.graph.node if len(node.input) > 1 and node.input[1] in made
    }


def _either(product: onnx.NodeProto, coder: onnx.NodeProto, condition: str) -> onnx.NodeProto:
    """Give an If that runs a product with its coded weight, or as it is."""
    branches = {}
    for name, is_coded in (("then_branch", True), ("else_branch", False)):
        inside, stem = [], f"{product.name}/{name}"
        own = onnx.NodeProto()
        own.CopyFrom(product)
        own.output[0] = f"{stem}/output"
        if is_coded:
            decoder = onnx.NodeProto()
            decoder.CopyFrom(coder)
            decoder.name, decoder.output[0] = f"{stem}/weight", f"{stem}/weight"
            own.input[1] = decoder.output[0]
            inside.append(decoder)
        output = helper.make_tensor_value_info(own.output[0], TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([*inside, own], stem, [], [output])
    return helper.make_node("If", [condition], list(product.output), f"{product.name}/either", **branches)
