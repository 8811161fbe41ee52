"""Static embeddings: a table of tokens and their mean, in every kind of scheme, without torch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.data import tokens as texts
from edgeq.data.sessions import embed_batches
from edgeq.graph import dialect
from edgeq.graph.edit import infer_shapes
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.integer.embedding_rows import scaled_rows
from edgeq.quantization.qdq import QdqBuilder
from edgeq.quantization.schemes import SCHEMES

ROWS, DIM = 200, 32
RANDOM = np.random.default_rng(0)
# Rows differ in length by a factor of a hundred, as those of frequent and rare tokens do.
TABLE = (RANDOM.standard_normal((ROWS, DIM)) * 10 ** RANDOM.uniform(-2, 0, (ROWS, 1))).astype(np.float32)


def static_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["mask", "one"], ["sum"], keepdims=1),
        helper.make_node("Clip", ["sum", "least"], ["count"]),
        helper.make_node("Div", ["mask", "count"], ["shares"]),
        helper.make_node("Unsqueeze", ["shares", "one"], ["pooling/weights"]),
        helper.make_node("MatMul", ["pooling/weights", "tokens"], ["pooling/pooled"]),
        helper.make_node("Squeeze", ["pooling/pooled", "one"], ["mean"]),
        helper.make_node("ReduceL2", ["mean", "one"], ["length"], keepdims=1),
        helper.make_node("Clip", ["length", "least"], ["clipped"]),
        helper.make_node("Div", ["mean", "clipped"], ["sentence_embedding"]),
    ]
    for node in nodes:
        node.name = node.output[0]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", DIM])
    stored = {"table": TABLE, "one": np.array([1], np.int64), "least": np.array(1e-9, np.float32)}
    graph = helper.make_graph(
        nodes, "static", ports, [output], [numpy_helper.from_array(array, name) for name, array in stored.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return infer_shapes(model)


def tokens(count: int, seed: int) -> texts.Tokens:
    rng = np.random.default_rng(seed)
    return texts.Tokens(tuple(tuple(rng.integers(1, ROWS, rng.integers(1, 30)).tolist()) for _ in range(count)), 0, 0)


@pytest.fixture(scope="module")
def observed() -> calibrate.Observed:
    dialect.verify(static_model(), "static")
    return calibrate.calibrate(static_model(), tokens(60, 1), 0, lambda *_: None)


@pytest.mark.parametrize(
    ("scheme", "least"), [("w8a8-gemm", 0.9999), ("w8a8-int", 0.999), ("w8a16-int", 0.999), ("w8a8-int-npu", 0.99)]
)
def test_a_static_model_has_codes_in_every_scheme(observed: calibrate.Observed, scheme: str, least: float) -> None:
    model, products, floats = quantize.quantize(observed.model, observed.statistics, SCHEMES[scheme])
    assert products == floats == ()
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert stored["table/codes"].dtype == np.int8 and not any(np.array_equal(item, TABLE) for item in stored.values())
    given = tokens(40, 2)
    batches = texts.batches(given, batch_size=8)
    expected = embed_batches(FloatSession.of(static_model()), batches, 40)
    found = embed_batches(FloatSession.of(model), batches, 40)
    cosines = (expected * found).sum(1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > least
    assert (np.roll(expected, 1, axis=0) * found).sum(1).mean() < 0.9  # swapped rows would be seen


def test_each_row_keeps_its_own_codes() -> None:
    model = ir.from_proto(static_model())
    graph = model.graph
    (lookup,) = [node for node in graph if node.op_type == "Gather"]
    scaled_rows(QdqBuilder(graph, {}), lookup, 8)
    (product,) = [node for node in graph if node.op_type == "Mul"]
    assert [node.op_type for node in (value.producer() for value in product.inputs)] == ["DequantizeLinear"] * 2  # type: ignore[union-attr]
    assert sum(node.op_type == "Gather" for node in graph) == 2
    (pooled,) = [node for node in graph if node.op_type == "MatMul"]
    assert pooled.inputs[1] is product.outputs[0]
    graph.outputs[0] = product.outputs[0]
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.arange(ROWS, dtype=np.int64)[None]
    (found,) = session.run(None, {name.name: ids for name in session.get_inputs()})
    error = np.abs(found[0] - TABLE).max(1) / np.abs(TABLE).max(1)
    assert error.max() < 0.006  # half a code of 127, and the row's factor
