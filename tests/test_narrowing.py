"""What some NPUs lack in 16 bits: the rewrites keep the function, and their codes keep small values beside large."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession

from edgeq.calibration.statistics import Statistics
from edgeq.errors import EdgeqError
from edgeq.graph import roles
from edgeq.graph.roles import Role
from edgeq.quantization import affine
from edgeq.quantization.rewrites import npu_operators
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import IntegerSpec

WIDTH, LENGTH = 64, 40
FORM = SCHEMES["w8a8-int-npu"].spec
assert isinstance(FORM, IntegerSpec)
RANDOM = np.random.default_rng(3)
# One token in ten has one channel two hundred times as large as the rest, as the residual of real models has.
ROWS = RANDOM.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
ROWS[:, ::10, 7] *= 200.0


def seen(values: np.ndarray) -> Statistics:
    flat = values.reshape(-1, values.shape[-1])
    return Statistics(flat.min(axis=0), flat.max(axis=0))


def graph_of(nodes: list[onnx.NodeProto], inputs: dict[str, list[int]], output: str) -> ir.Model:
    graph = helper.make_graph(
        nodes, "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.array([-1], np.int64), "last_axis"),
            numpy_helper.from_array(np.full((1, 1, 1), 30, np.float32), "count"),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def outlier_gelu(name: str) -> onnx.NodeProto:
    node = helper.make_node("Gelu", ["x"], [name], name=name)
    roles.note(node, Role.OUTLIER_BRANCH)
    return node


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def roots(rows: np.ndarray) -> tuple[ir.Model, npu_operators.Fixed]:
    """Give one over the root of each row's sum of squares, narrowed."""
    sums = (rows.astype(np.float64) ** 2).sum(-1, keepdims=True).astype(np.float32)
    model = graph_of(
        [
            helper.make_node("ReduceSumSquare", ["x", "last_axis"], ["n/squares"], name="n/squares"),
            helper.make_node("Sqrt", ["n/squares"], ["n/root"], name="n/root"),
            helper.make_node("Reciprocal", ["n/root"], ["n/inverse"], name="n/inverse"),
            helper.make_node("Mul", ["x", "n/inverse"], ["y"], name="y"),
        ],
        {"x": [1, LENGTH, WIDTH]},
        "y",
    )
    observed = {"x": seen(rows), "n/squares": seen(sums), "n/inverse": seen(1 / np.sqrt(sums))}
    return model, npu_operators.npu_operators(model.graph, observed, FORM)


def coded(model: ir.Model, fixed: npu_operators.Fixed, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run with each tensor that has fixed codes rounded to them, in the order of the graph, and give them all."""
    values = dict(feeds) | {name: item.const_value.numpy() for name, item in model.graph.initializers.items()}
    for node in ir.to_proto(model).graph.node:
        single = helper.make_model(
            helper.make_graph(
                [node], "one", [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.input],
                [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
        )  # fmt: skip
        (result,) = ReferenceEvaluator(single).run(None, {name: values[name] for name in node.input})
        if node.output[0] in fixed:
            result = affine.dequantize(affine.quantize(result, fixed[node.output[0]]), fixed[node.output[0]])
        values[node.output[0]] = result
    return values


def test_squares_in_two_parts_add_up() -> None:
    model, fixed = roots(ROWS)
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("Clip"), kinds.count("Sqrt")) == (1, 2)
    found = coded(model, fixed, {"x": ROWS})
    np.testing.assert_allclose(found["n/squares"], (ROWS.astype(np.float64) ** 2).sum(-1, keepdims=True), rtol=2e-3)
    small = np.abs(ROWS[..., 7]).reshape(-1) < 3.0
    assert np.abs(found["n/squares/excess"].reshape(LENGTH, -1)[small]).max() == 0.0


def test_small_sums_keep_their_precision_beside_large_ones() -> None:
    model, fixed = roots(ROWS)
    found = coded(model, fixed, {"x": ROWS})["n/inverse"]
    wanted = 1 / np.sqrt((ROWS.astype(np.float64) ** 2).sum(-1, keepdims=True))
    assert np.abs(found / wanted - 1).max() < 2e-3


def test_one_scale_for_all_squares_would_lose_them() -> None:
    step = float((np.abs(ROWS).max() * 1.25) ** 2 / 32767)
    plain = (np.rint(ROWS.astype(np.float64) ** 2 / step) * step).sum(-1)
    wanted = (ROWS.astype(np.float64) ** 2).sum(-1)
    assert np.abs(np.sqrt(plain / wanted) - 1).max() > 2e-2


def test_sums_of_one_size_need_no_second_root() -> None:
    even = RANDOM.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
    model, fixed = roots(even)
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("Clip"), kinds.count("Sqrt")) == (0, 1)
    found = coded(model, fixed, {"x": even})["n/inverse"]
    assert np.abs(found * np.sqrt((even**2).sum(-1, keepdims=True)) - 1).max() < 2e-3


def test_pooling_weighs_and_adds_the_tokens() -> None:
    model = graph_of(
        [
            helper.make_node("Div", ["attention_mask", "count"], ["share"], name="share"),
            helper.make_node("MatMul", ["share", "x"], ["pooling/pooled"], name="pooling/pooled"),
        ],
        {"attention_mask": [1, 1, LENGTH], "x": [1, LENGTH, WIDTH]},
        "pooling/pooled",
    )
    mask = (np.arange(LENGTH) < 30).astype(np.float32)[None, None]
    share = mask / 30
    npu_operators.npu_operators(model.graph, {"x": seen(ROWS), "pooling/pooled": seen(share @ ROWS)}, FORM)
    assert "MatMul" not in [node.op_type for node in model.graph]
    np.testing.assert_allclose(run(model, attention_mask=mask, x=ROWS), share @ ROWS, atol=1e-5)


@pytest.mark.parametrize("size", [0.5, 3.0, 40.0])
def test_gelu_of_the_side_path_stays_near_gelu(size: float) -> None:
    name = "gelu"
    model = graph_of([outlier_gelu(name)], {"x": [1, LENGTH, WIDTH]}, name)
    x = np.linspace(-size, size, LENGTH * WIDTH, dtype=np.float32).reshape(1, LENGTH, WIDTH)
    wanted = run(model, x=x)
    fixed = npu_operators.npu_operators(model.graph, {"x": seen(x), name: seen(wanted)}, FORM)
    assert "Sigmoid" in [node.op_type for node in model.graph]
    found = coded(model, fixed, {"x": x})[name]
    assert np.abs(found - wanted).max() < max(1e-3, size * 1e-4)


def test_what_the_form_allows_stays() -> None:
    form = SCHEMES["w8a8-int"].spec
    assert isinstance(form, IntegerSpec)
    model = graph_of([outlier_gelu("gelu")], {"x": [1, 8]}, "gelu")
    assert npu_operators.npu_operators(model.graph, {}, form) == {}
    assert [node.op_type for node in model.graph] == ["Gelu"]


def test_a_tensor_without_statistics_is_named() -> None:
    model = graph_of(
        [helper.make_node("ReduceSumSquare", ["x", "last_axis"], ["n/squares"], name="n/squares")],
        {"x": [1, LENGTH, WIDTH]},
        "n/squares",
    )
    with pytest.raises(EdgeqError, match="n/squares: the calibration has no statistics"):
        npu_operators.npu_operators(model.graph, {}, FORM)
