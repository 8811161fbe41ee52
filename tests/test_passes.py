"""Each rewrite on the smallest graph that has its pattern: structure, numbers and near misses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.data.tokens import Feeds
from edgeq.errors import EdgeqError
from edgeq.graph.edit import Rewrites
from edgeq.passes.apply import apply_to, without_statistics
from edgeq.passes.constant_segment import constant_segment
from edgeq.passes.finite_fill import finite_fill
from edgeq.passes.finite_mask import finite_mask
from edgeq.passes.fold_attention_scale import fold_attention_scale
from edgeq.passes.pool_by_matmul import pool_by_matmul
from edgeq.passes.recover_gelu import recover_gelu
from edgeq.passes.recover_layer_normalization import recover_layer_normalization
from edgeq.passes.split_gemm import split_gemm

Node = tuple[str, list[str], str, dict[str, object]]
RNG = np.random.default_rng(0)


def graph(nodes: list[Node], constants: dict[str, np.ndarray], shape: list[object], out: str = "y") -> onnx.ModelProto:
    """Make a model with the float input x and the output `out` of the same rank."""
    made = [helper.make_node(op, inputs, [output], name=f"node_{output}", **more) for op, inputs, output, more in nodes]
    proto = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def rewritten(model: onnx.ModelProto, rewrite: Callable[[ir.Model], Rewrites]) -> tuple[onnx.ModelProto, Rewrites]:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    edited = ir.from_proto(model)
    done = rewrite(edited)
    RemoveUnusedNodesPass()(edited)
    proto = ir.to_proto(edited)
    onnx.checker.check_model(proto, full_check=True)
    return proto, done


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


LAST = np.array([-1], np.int64)
NORM: list[Node] = [
    ("ReduceMean", ["x", "last"], "mean", {"keepdims": 1}),
    ("Sub", ["x", "mean"], "d", {}),
    ("Pow", ["d", "two"], "squares", {}),
    ("ReduceMean", ["squares", "last"], "variance", {"keepdims": 1}),
    ("Add", ["variance", "eps"], "shifted", {}),
    ("Sqrt", ["shifted"], "root", {}),
    ("Div", ["d", "root"], "unit", {}),
    ("Mul", ["unit", "w"], "weighted", {}),
    ("Add", ["weighted", "b"], "y", {}),
]


def norm_constants(power: float = 2.0) -> dict[str, np.ndarray]:
    w, b = RNG.standard_normal((2, 8)).astype(np.float32)
    return {"last": LAST, "two": np.array(power, np.float32), "eps": np.array(1e-5, np.float32), "w": w, "b": b}


def test_layer_normalization_is_recovered() -> None:
    model = graph(NORM, norm_constants(), ["n", 8])
    new, done = rewritten(model, recover_layer_normalization)
    assert (done.count, operators(new)) == (1, {"LayerNormalization": 1})
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-5


def test_a_near_layer_normalization_says_why() -> None:
    model = graph(NORM, norm_constants(power=3.0), ["n", 8])
    new, done = rewritten(model, recover_layer_normalization)
    assert done.count == 0 and "not the rest of a layer normalisation" in done.near_misses[0]
    assert operators(new) == operators(model)


def gelu_nodes(half_first: bool) -> list[Node]:
    start: list[Node] = [("Div", ["x", "root2"], "s", {}), ("Erf", ["s"], "e", {}), ("Add", ["e", "one"], "p", {})]
    if half_first:
        return [*start, ("Mul", ["x", "half"], "h", {}), ("Mul", ["h", "p"], "y", {})]
    return [*start, ("Mul", ["x", "p"], "q", {}), ("Mul", ["q", "half"], "y", {})]


@pytest.mark.parametrize("half_first", [True, False])
def test_gelu_is_recovered(half_first: bool) -> None:
    constants = {name: np.array(value, np.float32) for name, value in (("root2", 2**0.5), ("one", 1), ("half", 0.5))}
    model = graph(gelu_nodes(half_first), constants, ["n", 4])
    new, done = rewritten(model, recover_gelu)
    assert (done.count, operators(new)) == (1, {"Gelu": 1})
    x = RNG.standard_normal((6, 4)).astype(np.float32) * 3
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-6


def test_another_erf_is_left_alone() -> None:
    constants = {name: np.array(value, np.float32) for name, value in (("root2", 1.5), ("one", 1), ("half", 0.5))}
    model = graph(gelu_nodes(True), constants, ["n", 4])
    _, done = rewritten(model, recover_gelu)
    assert done.count == 0 and "Erf" in done.near_misses[0]


def attention(scale_op: str = "Mul", query_op: str = "Add") -> onnx.ModelProto:
    nodes: list[Node] = [("MatMul", ["x", "wq"], "q0", {})]
    nodes += [(query_op, ["q0", "bq"] if query_op == "Add" else ["q0"], "q", {})]
    nodes += [
        ("MatMul", ["x", "wk"], "k", {}),
        ("Transpose", ["k"], "kt", {"perm": [0, 2, 1]}),
        ("MatMul", ["q", "kt"], "scores", {}),
        (scale_op, ["scores", "factor"], "scaled", {}),
        ("Softmax", ["scaled"], "y", {"axis": -1}),
    ]
    wq, wk = RNG.standard_normal((2, 8, 8)).astype(np.float32)
    factor = np.array(0.25 if scale_op == "Mul" else 4.0, np.float32)
    return graph(
        nodes, {"wq": wq, "wk": wk, "bq": RNG.standard_normal(8).astype(np.float32), "factor": factor}, [2, "n", 8]
    )


@pytest.mark.parametrize("query_op", ["Add", "Identity", "Neg"])
@pytest.mark.parametrize("scale_op", ["Mul", "Div"])
def test_the_attention_scale_moves_into_the_query(scale_op: str, query_op: str) -> None:
    model = attention(scale_op, query_op)
    new, done = rewritten(model, fold_attention_scale)
    assert done.count == 1 and scale_op not in operators(new)
    x = RNG.standard_normal((2, 5, 8)).astype(np.float32)
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-6


def test_a_query_that_is_no_product_keeps_the_scale() -> None:
    _, done = rewritten(attention(query_op="Tanh"), fold_attention_scale)
    assert done.count == 0 and "no product with constant weights" in done.near_misses[0]


def pooling(axis: int = 1, divisor: str = "number") -> onnx.ModelProto:
    nodes: list[Node] = [
        ("Mul", ["x", "mask"], "masked", {}),
        ("ReduceSum", ["masked", "axis"], "total", {"keepdims": 0}),
        ("ReduceSum", ["mask", "axis"], "count", {"keepdims": 0}),
        ("Clip", ["count", "least"], "number", {}),
        ("Sqrt", ["number"], "root", {}),
        ("Div", ["total", divisor], "y", {}),
    ]
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.float32)[:, :, None]
    return graph(nodes, {"mask": mask, "axis": np.array([axis]), "least": np.array(1e-9, np.float32)}, [2, 3, 4])


@pytest.mark.parametrize(("divisor", "name"), [("number", "pooling/pooled"), ("root", "root_pooling/pooled")])
def test_mean_pooling_becomes_a_product(divisor: str, name: str) -> None:
    model = pooling(divisor=divisor)
    new, done = rewritten(model, pool_by_matmul)
    assert done.count == 1 and [node.name for node in new.graph.node if node.op_type == "MatMul"] == [name]
    x = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-6


def test_a_sum_over_another_axis_is_left_alone() -> None:
    _, done = rewritten(pooling(axis=2), pool_by_matmul)
    assert done.count == 0 and "another axis" in done.near_misses[0]


def test_a_constant_segment_becomes_its_row() -> None:
    nodes: list[Node] = [
        ("Shape", ["x"], "shape", {"end": 2}),
        ("Expand", ["zero", "shape"], "segments", {}),
        ("Gather", ["table", "segments"], "rows", {}),
        ("Add", ["x", "rows"], "y", {}),
    ]
    table = RNG.standard_normal((2, 4)).astype(np.float32)
    model = graph(nodes, {"zero": np.array(0, np.int64), "table": table}, [2, "n", 4])
    new, done = rewritten(model, constant_segment)
    assert (done.count, operators(new)) == (1, {"Add": 1})
    x = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    assert np.array_equal(run(model, x=x), run(new, x=x))


def test_an_infinite_mask_without_attention_mask_says_why() -> None:
    nodes: list[Node] = [("Greater", ["x", "zero"], "keep", {}), ("Where", ["keep", "zero", "low"], "y", {})]
    model = graph(nodes, {"zero": np.array(0, np.float32), "low": np.array(-3.4e38, np.float32)}, [2, 3])
    _, done = rewritten(model, finite_mask)
    assert done.count == 0


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_becomes_product_and_sum(transposed: int) -> None:
    attributes: dict[str, object] = {"alpha": 0.5, "beta": 2.0, "transB": transposed}
    weight = RNG.standard_normal((3, 4) if transposed else (4, 3)).astype(np.float32)
    bias = RNG.standard_normal(3).astype(np.float32)
    model = graph([("Gemm", ["x", "w", "b"], "y", attributes)], {"w": weight, "b": bias}, ["n", 4])
    new, done = rewritten(model, split_gemm)
    assert (done.count, operators(new)) == (1, {"MatMul": 1, "Add": 1})
    x = RNG.standard_normal((5, 4)).astype(np.float32)
    assert np.abs(run(model, x=x) - run(new, x=x)).max() < 1e-6


@pytest.mark.parametrize("reader", ["ReduceMax", "ReduceMin"])
def test_an_infinite_fill_becomes_finite_before_a_maximum_only(reader: str) -> None:
    nodes: list[Node] = [
        ("Where", ["padding", "low", "x"], "filled", {}),
        (reader, ["filled", "axis"], "y", {"keepdims": 0}),
    ]
    padding = np.array([[False, False, True]])
    model = graph(nodes, {"padding": padding, "low": np.array(-np.inf, np.float32), "axis": np.array([1])}, [2, 3])
    new, done = rewritten(model, finite_fill)
    assert (done.count, len(done.near_misses)) == ((1, 0) if reader == "ReduceMax" else (0, 1))
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    assert np.array_equal(run(model, x=x), run(new, x=x))


def test_a_pass_that_moves_the_outputs_is_a_defect() -> None:
    import encoder

    def halve(model: ir.Model) -> Rewrites:
        weight = model.graph.initializers["layer.0.ffn.weight"]
        assert weight.const_value is not None
        weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(0.5), name=weight.name)
        return Rewrites(1)

    ids = np.array([[5, 6, 7, 8], [9, 3, 0, 0]], np.int64)
    feeds = (Feeds(ids, (ids > 0).astype(np.int64)),)
    with pytest.raises(EdgeqError, match="halve: moved the FP32 outputs"):
        apply_to(encoder.encoder(), feeds, (without_statistics(halve),), None)


def test_a_pass_that_does_nothing_changes_nothing() -> None:
    import encoder

    ids = np.array([[5, 6, 7, 8]], np.int64)
    model = encoder.encoder()
    feeds = (Feeds(ids, np.ones_like(ids)),)
    new, (report,) = apply_to(model, feeds, (lambda graph, statistics: Rewrites(0, ("why",)),), None)
    assert (report.rewrites, report.max_abs_error, report.near_misses) == (0, 0.0, ("why",))
    assert [node.op_type for node in new.graph] == [node.op_type for node in model.graph.node]
