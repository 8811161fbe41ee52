"""The lowering to Gemm on flat tokens: what it makes, that it computes the same, and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest

from edgeq import calibrate, quantize
from edgeq.backends import onnxruntime as backend
from edgeq.backends.contract import embed_batches
from edgeq.reference import FloatSession
from edgeq.schemes import SCHEMES
from edgeq.texts import Feeds, Tokens, batches

INTEGER_PRODUCTS, SIDE_PRODUCTS = 12, 4


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
    assert operators["Gemm"] == INTEGER_PRODUCTS + SIDE_PRODUCTS
    assert operators["MatMul"] == 2 * 2 + 1 + 1  # attention, pooling, Dense
    names = {node.name for node in graph.node if node.op_type == "Gemm"}
    assert names == {node.name for node in onnx.load(qdq).graph.node if node.op_type == "MatMul"} - {
        node.name for node in graph.node if node.op_type == "MatMul"
    }


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
    for tensor in model.graph.initializer:
        if tensor.name == "layer.1.ffn.bias":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0] = 1e9
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "large.onnx")
    plain, large = (
        Counter(node.op_type for node in backend.flattened(path).graph.node) for path in (qdq, tmp_path / "large.onnx")
    )
    assert large["Add"] == plain["Add"] + 1
