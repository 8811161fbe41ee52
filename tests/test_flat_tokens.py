"""The lowering to Gemm on flat tokens, heads joined: what it makes, that it computes the same, what it leaves alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgeq.backends import onnxruntime as backend
from edgeq.backends.onnxruntime.joined_heads import JOINT, joined_heads
from edgeq.data.sessions import embed_batches
from edgeq.data.tokens import Feeds, Tokens, batches
from edgeq.graph.edit import add_constant, add_node, made_by, readers
from edgeq.graph.float_session import FloatSession
from edgeq.passes.matmul_to_gemm import matmul_to_gemm
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.schemes import SCHEMES

LAYERS, INTEGER_PRODUCTS, SIDE_PRODUCTS = 2, 12, 2


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def qdq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seen = calibrate.calibrate(encoder.encoder(dense=True), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)
    path = tmp_path_factory.mktemp("qdq") / "qdq.onnx"
    onnx.save(quantize.quantize(seen.model, seen.statistics, SCHEMES["w8a8-gemm"])[0], path)
    return path


def test_every_token_level_product_becomes_a_gemm(qdq: Path) -> None:
    graph = backend.flattened(qdq).graph
    operators = Counter(node.op_type for node in graph.node)
    joined = 2 * LAYERS  # query, key and value are one
    assert operators["Gemm"] == INTEGER_PRODUCTS + SIDE_PRODUCTS - joined
    assert operators["MatMul"] == 2 * LAYERS + 1 + 1  # attention, pooling, Dense
    names = {name for node in graph.node if node.op_type == "Gemm" for name in node.name.split(JOINT)}
    assert names == {node.name for node in onnx.load(qdq).graph.node if node.op_type == "MatMul"} - {
        node.name for node in graph.node if node.op_type == "MatMul"
    }


def test_joined_heads_give_the_same_bits(qdq: Path) -> None:
    apart = ir.load(qdq)
    matmul_to_gemm(apart)
    joined = ir.from_proto(ir.to_proto(apart))
    assert joined_heads(joined) == LAYERS
    tokens = Tokens(encoder.tokens(5, 24), 0, 0)
    old, new = (embed_batches(FloatSession.of(ir.to_proto(model)), batches(tokens), 24) for model in (apart, joined))
    assert np.array_equal(old, new)


def test_onnx_runtime_keeps_heads_joined(qdq: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(backend.flattened(qdq).SerializeToString(), options)
    optimized = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert optimized["Transpose"] == 2 * LAYERS  # heads to the front and the context back
    assert optimized["FusedMatMul"] == LAYERS  # the key is read turned


@pytest.mark.parametrize("reason", ["read by another", "another size of head"])
def test_heads_that_differ_stay_apart(qdq: Path, reason: str) -> None:
    model = ir.load(qdq)
    matmul_to_gemm(model)
    products = {node.name: node for node in model.graph if node.op_type == "Gemm"}
    reshape = readers(products["layer.0.value"].outputs[0])[0]
    if reason == "read by another":
        add_node(reshape, "Identity", [products["layer.0.value"].outputs[0]], "other")
    else:
        concat = made_by(reshape.inputs[1], "Concat")
        assert concat is not None
        tail = add_constant(model.graph, "tail", np.array([encoder.HEADS // 2, 2 * encoder.DIM // encoder.HEADS]))
        shape = add_node(reshape, "Concat", [concat.inputs[0], tail], "other_shape", {"axis": 0})  # type: ignore[list-item]
        reshape.replace_input_with(1, shape)
    assert joined_heads(model) == LAYERS
    assert {"layer.0.value", "layer.0.query + layer.0.key"} <= {node.name for node in model.graph}


def test_the_vectors_stay_the_same(qdq: Path) -> None:
    tokens = Tokens(encoder.tokens(3, 40), 0, 0)
    old, new = (
        embed_batches(FloatSession.of(model), batches(tokens), 40) for model in (onnx.load(qdq), backend.flattened(qdq))
    )
    cosines = np.sum(old * new, axis=1) / np.linalg.norm(old, axis=1) / np.linalg.norm(new, axis=1)
    assert cosines.min() > 0.9995


def test_lowering_twice_gives_the_same_bytes(qdq: Path) -> None:
    first, second = (backend.flattened(qdq).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_shapes_stay_symbolic(qdq: Path) -> None:
    session = FloatSession.of(backend.flattened(qdq))
    for batch, sequence in ((1, 1), (3, 5), (2, encoder.LONGEST)):
        ids = np.random.default_rng(0).integers(1, encoder.VOCABULARY, (batch, sequence))
        assert session(Feeds(ids, np.ones_like(ids))).shape == (batch, encoder.DIM)


def test_a_bias_that_does_not_fit_stays_an_add(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    (product,) = (node for node in model.graph.node if node.name == "layer.1.ffn")
    (add,) = (node for node in model.graph.node if product.output[0] in node.input)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name in add.input)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] = 1e9
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "large.onnx")
    plain, large = (
        Counter(node.op_type for node in backend.flattened(path).graph.node) for path in (qdq, tmp_path / "large.onnx")
    )
    assert large["Add"] == plain["Add"] + 1
