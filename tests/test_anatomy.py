from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.analysis.inspect.model_file import inspect
from edgeq.errors import ConfigError


def _quantised_product() -> onnx.ModelProto:
    """x -> Q -> DQ -> MatMul(DQ(int8 weights)) -> Add(float bias) -> y."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero_point"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero_point"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale"], ["w_dq"], axis=1),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    stored = {
        "x_scale": np.float32(0.1),
        "x_zero_point": np.uint8(128),
        "w_q": np.ones((4, 3), np.int8),
        "w_scale": np.ones(3, np.float32),
        "bias": np.ones(3, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(_quantised_product(), path)
    return path


def test_operators_are_counted_by_the_dtypes_behind_dequantize_linear(model_path: Path) -> None:
    assert inspect(model_path).operators == {
        "DequantizeLinear": {"int8": 1, "uint8": 1},
        "Add": {"float32": 1},
        "MatMul": {"uint8 x int8": 1},
        "QuantizeLinear": {"uint8": 1},
    }


def test_tensors_are_summed_by_dtype_with_their_bytes(model_path: Path) -> None:
    tensors = inspect(model_path).tensors
    assert {dtype: (group.count, group.elements, group.size_bytes) for dtype, group in tensors.items()} == {
        "float32": (3, 7, 28),
        "int8": (1, 12, 12),
        "uint8": (1, 1, 1),
    }


def test_ports_keep_symbolic_axes(model_path: Path) -> None:
    anatomy = inspect(model_path)
    assert anatomy.inputs[0].shape == ("batch", 4)
    assert anatomy.outputs[0].name == "y"
    assert anatomy.size_bytes == model_path.stat().st_size
    assert anatomy.largest[0].name in {"w_q", "w_scale", "bias"}


def test_external_data_counts_into_the_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(_quantised_product(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert inspect(path).size_bytes == path.stat().st_size + (tmp_path / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("damage", ["empty", "noise", "cut", "text"])
def test_a_damaged_file_is_refused_and_named(model_path: Path, damage: str) -> None:
    whole = model_path.read_bytes()
    contents = {
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(500),
        "cut": whole[: len(whole) // 2],
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }
    model_path.write_bytes(contents[damage])
    with pytest.raises(ConfigError, match=r"model\.onnx"):
        inspect(model_path)


def test_a_graph_that_breaks_the_rules_is_refused(tmp_path: Path) -> None:
    model = _quantised_product()
    model.graph.node[3].input[0] = "nobody"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ConfigError, match="nobody"):
        inspect(path)


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is there"):
        inspect(tmp_path / "missing.onnx")
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        inspect(tmp_path)
