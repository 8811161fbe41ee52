"""What lowering for HTP makes of a QDQ model of one length, without the compiler; and the rewrites of HTP alone."""

from __future__ import annotations

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq import targets
from edgeq.backends import qnn
from edgeq.backends.qnn.right_operands import fit_right_operands
from edgeq.backends.qnn.static import static
from edgeq.calibration.statistics import Statistics
from edgeq.data.tokens import Feeds, Tokens
from edgeq.errors import ConfigError
from edgeq.graph.edit import checked, constant, made_by
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import affine, quantize
from edgeq.quantization.rewrites.divide_by_multiplying import divide_by_multiplying
from edgeq.quantization.rewrites.mish_by_sigmoid import mish_by_sigmoid
from edgeq.quantization.rewrites.rms_norm_to_operator import rms_norm_to_operator
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import Target

LENGTH = 16
GEN_3, V68 = (targets.load_target(name) for name in ("snapdragon-8-gen-3", "qualcomm-v68"))
X = np.random.default_rng(5).normal(0.0, 3.0, (2, 7, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def qdq() -> onnx.ModelProto:
    """Quantise an encoder with local attention."""
    given = encoder.encoder(attention="local")
    seen = calibrate.calibrate(given, Tokens(encoder.tokens(1, 64), 0, 0), 0, lambda *_: None)
    return quantize.quantize(seen.model, seen.statistics, SCHEMES["w8a16-htp"])[0]


def of_length(model: onnx.ModelProto, target: Target, length: int = LENGTH) -> onnx.ModelProto:
    return static(ir.from_proto(model), length, target)


def embed(model: onnx.ModelProto) -> np.ndarray:
    ids = np.random.default_rng(1).integers(2, encoder.VOCABULARY, (1, LENGTH))
    mask = (np.arange(LENGTH) < 11).astype(np.int64)[None]
    return FloatSession.of(model, optimize=False)(Feeds(ids * mask, mask))


def test_what_follows_from_the_length_is_integers(qdq: onnx.ModelProto) -> None:
    fixed = ir.from_proto(of_length(qdq, V68)).graph
    (limited,) = (node for node in fixed if node.op_type == "Min")
    pattern = made_by(limited.inputs[1], "DequantizeLinear")
    codes = constant(pattern.inputs[0]) if pattern is not None else None
    assert codes is not None and codes.dtype == np.uint16 and codes.shape[-2:] == (LENGTH, LENGTH)
    near = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))) <= 3
    assert (codes.reshape(LENGTH, LENGTH) == np.where(near, codes.max(), 0)).all()
    assert not {"Range", "Shape", "LessOrEqual", "Abs"} & {node.op_type for node in fixed}


@pytest.mark.parametrize(("target", "most"), [(V68, 0.0), (GEN_3, 1e-3)])
def test_the_vectors_are_those_of_every_length(qdq: onnx.ModelProto, target: Target, most: float) -> None:
    assert np.abs(embed(of_length(qdq, target)) - embed(qdq)).max() <= most


def test_both_operands_have_16_bits_that_the_unit_reads(qdq: onnx.ModelProto) -> None:
    def rights(target: Target) -> set[str]:
        found = set()
        for node in ir.from_proto(of_length(qdq, target)).graph:
            source = made_by(node.inputs[1], "DequantizeLinear") if node.op_type == "MatMul" else None
            zero_point = constant(source.inputs[2]) if source is not None else None
            if zero_point is not None:
                found.add(str(zero_point.dtype))
        return found

    assert rights(V68) == {"uint16"} and rights(GEN_3) == {"int16"}


@pytest.mark.parametrize(("version", "dtype", "most"), [(68, np.uint8, 0.01), (75, np.int16, 1e-4)])
def test_a_constant_right_operand_is_stored_as_the_version_reads_it(version: int, dtype: type, most: float) -> None:
    table = np.random.default_rng(2).uniform(-1.0, 2.0, (8, 5)).astype(np.float32)
    params = affine.asymmetric(-1.0, 2.0, 16)
    stored = {
        "codes": affine.quantize(table, params).astype(np.uint16), "scale": np.array(params.scale, np.float32),
        "zero_point": np.array(params.zero_point, np.uint16),
    }  # fmt: skip
    made = [
        helper.make_node("DequantizeLinear", list(stored), ["real"], name="real"),
        helper.make_node("MatMul", ["x", "real"], ["y"], name="product"),
    ]
    sizes = {"x": 8, "y": 5}
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", size]) for name, size in sizes.items()]
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(made, "g", ports[:1], ports[1:], weights)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    fit_right_operands(model.graph, version)
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    source = made_by(product.inputs[1], "DequantizeLinear")
    codes, scale, zero_point = (constant(value) for value in source.inputs) if source is not None else (None,) * 3
    assert codes is not None and scale is not None and zero_point is not None and codes.dtype == dtype
    assert np.abs((codes.astype(np.float64) - zero_point) * scale - table).max() < most


def test_a_bias_by_distance_is_stored_once_as_integers() -> None:
    stored = {
        "zero": np.array(0, np.int64), "one": np.array(1, np.int64), "axis0": np.array([0], np.int64),
        "axis1": np.array([1], np.int64), "table": np.linspace(-1, 1, 2 * LENGTH, dtype=np.float32)[:, None],
        "middle": np.array(LENGTH, np.int64), "scale": np.array(2 / 65535, np.float32),
        "zero_point": np.array(32768, np.uint16),
    }  # fmt: skip
    nodes = [
        ("Shape", ["input_ids"], "sizes"), ("Gather", ["sizes", "one"], "length"),
        ("Range", ["zero", "length", "one"], "places"), ("Unsqueeze", ["places", "axis0"], "row"),
        ("Unsqueeze", ["places", "axis1"], "column"), ("Sub", ["row", "column"], "distance"),
        ("Add", ["distance", "middle"], "index"), ("Gather", ["table", "index"], "biases"),
        ("Transpose", ["biases"], "turned"), ("Cast", ["attention_mask"], "x"),
    ]  # fmt: skip
    made = [
        helper.make_node(kind, inputs, [name], name=name, **({"to": 1} if kind == "Cast" else {}))
        for kind, inputs, name in nodes
    ]
    made[-2].attribute.append(helper.make_attribute("perm", [2, 0, 1]))
    for place in "ab":
        pair = [f"{place}_codes", "scale", "zero_point"]
        made += [
            helper.make_node("QuantizeLinear", ["turned", "scale", "zero_point"], [pair[0]], name=pair[0]),
            helper.make_node("DequantizeLinear", pair, [f"{place}_real"], name=f"{place}_real"),
        ]
    made += [
        helper.make_node("Add", ["a_real", "x"], ["sum"], name="sum"),
        helper.make_node("Add", ["b_real", "sum"], ["sentence_embedding"], name="end"),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", LENGTH, LENGTH])
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(made, "g", ports, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    fixed = of_length(model, V68).graph
    assert [node.op_type for node in fixed.node] == ["Cast", "DequantizeLinear", "DequantizeLinear", "Add", "Add"]
    (codes,) = (item for item in fixed.initializer if item.name.endswith("/of_length"))
    assert (codes.data_type, list(codes.dims)) == (TensorProto.UINT16, [1, LENGTH, LENGTH])


def test_a_bucket_beyond_the_table_of_positions_is_one_line(qdq: onnx.ModelProto) -> None:
    said = f"buckets_tokens has 64, but the model has {encoder.LONGEST} positions (positions). Give buckets of at most"
    with pytest.raises(ConfigError) as error:
        of_length(qdq, GEN_3, 64)
    assert str(error.value).startswith(f"{GEN_3.name}: {said}") and "\n" not in str(error.value)
    plan = qnn.planned(ir.from_proto(qdq), 64, GEN_3)
    assert len(plan.problems) == 1 and plan.problems[0].startswith(said)
    assert qnn.planned(ir.from_proto(qdq), encoder.LONGEST, GEN_3).problems == ()


# rewrites ------------------------------------------------------------------------------------------------------------


def model_of(nodes: list[tuple[str, list[str], str]]) -> ir.Model:
    """Build a graph from x to y."""
    stored = {
        "two": np.array(2, np.float32), "last": np.array([-1], np.int64), "tiny": np.array(1e-6, np.float32),
        "gain": np.arange(1, 9, dtype=np.float32), "five": np.array(5, np.float32),
    }  # fmt: skip
    made = [helper.make_node(kind, inputs, [output], name=f"node_{output}") for kind, inputs, output in nodes]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", 8]) for name in "xy"]
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(made, "g", ports[:1], ports[1:], weights)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(whole))


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(checked(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": X})[0]
    return found


NORM = [
    ("Mul", ["x", "x"], "square"), ("ReduceMean", ["square", "last"], "mean"), ("Add", ["mean", "tiny"], "kept"),
    ("Sqrt", ["kept"], "root"), ("Div", ["x", "root"], "unit"),
]  # fmt: skip


def test_rms_norm_is_one_operator() -> None:
    model = model_of([*NORM, ("Mul", ["unit", "gain"], "y")])
    before = run(model)
    assert rms_norm_to_operator(model).count == 1
    (node,) = model.graph
    assert node.op_type == "RMSNormalization" and node.attributes["epsilon"].as_float() == pytest.approx(1e-6)
    assert np.abs(run(model) - before).max() < 1e-5
    assert model.graph.opset_imports[""] == 23


def test_a_root_without_a_gain_is_no_rms_norm() -> None:
    model = model_of([*NORM, ("Add", ["unit", "gain"], "y")])
    assert rms_norm_to_operator(model).count == 0 and model.graph.opset_imports[""] == 21


def test_mish_is_the_same_function_by_a_sigmoid() -> None:
    model = model_of([("Mish", ["x"], "h"), ("Add", ["h", "two"], "y")])
    before, statistics = run(model), dict[str, Statistics]()
    assert mish_by_sigmoid(model, statistics).count == 1
    assert "Mish" not in {node.op_type for node in model.graph}
    assert np.abs(run(model) - before).max() < 1e-5
    assert {"h/shut", "h/square", "h/above", "h/below", "h/gate"} <= statistics.keys()
    assert [node.outputs[0].name for node in model.graph if node.op_type == "Mul"][-1] == "h"


def test_a_division_by_one_number_is_a_product() -> None:
    model = model_of([("Div", ["x", "five"], "h"), ("Div", ["h", "gain"], "g"), ("Add", ["g", "two"], "y")])
    before = run(model)
    assert divide_by_multiplying(model).count == 1  # a division by a number for each channel stays
    assert [node.op_type for node in model.graph] == ["Mul", "Div", "Add"]
    assert model.graph[0].outputs[0].name == "h" and np.abs(run(model) - before).max() < 1e-5
