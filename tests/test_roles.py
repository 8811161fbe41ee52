"""What a node is for stands in its metadata: it survives saving, goes before shipping, and no name decides it."""

from __future__ import annotations

import ast
from pathlib import Path

import encoder
import onnx
import onnx_ir as ir
import pytest
import tiny_integer

from edgeq.backends import onnxruntime as backend
from edgeq.graph import roles
from edgeq.graph.roles import Role
from edgeq.graph.static_shapes import fix_shapes
from edgeq.quantization.quantize import quantize
from edgeq.quantization.schemes import SCHEMES

REPOSITORY = Path(__file__).resolve().parent.parent
# What these ask is not what a node of a graph is: they read names that other programs wrote.
ALLOWED = {
    "analysis/inspect/tflite.py": 2,  # the schema's attributes, and dtypes
    "backends/openvino/placement.py": 1,  # OpenVINO's names of kernels
    "backends/tflite/kernels.py": 3,  # the schema's attributes, and dtypes
}
FOLDERS = ("graph", "passes", "calibration", "quantization", "backends", "analysis")


def test_roles_are_added_and_read() -> None:
    node = ir.node("Relu", [None], name="a")
    assert roles.of(node) == frozenset() and not roles.has(node, Role.POOLING) and not roles.has(None, Role.POOLING)
    roles.give(node, Role.POOLING)
    roles.give(node, Role.PICKED_TOKEN)
    assert roles.of(node) == {Role.POOLING, Role.PICKED_TOKEN}
    other = ir.node("Relu", [None], name="b")
    roles.hand_over(node, other)
    assert roles.of(other) == roles.of(node)
    roles.hand_over(ir.node("Relu", [None], name="c"), other)
    assert roles.has(other, Role.POOLING)


def test_a_role_of_another_version_is_left_out() -> None:
    node = ir.node("Relu", [None], name="a")
    node.metadata_props[roles.KEY] = "pooling of-tomorrow"
    assert roles.of(node) == {Role.POOLING}


def test_roles_survive_a_file_and_stripping_takes_them_alone(tmp_path: Path) -> None:
    model = encoder.encoder()
    model.graph.node[0].metadata_props.add(key="another", value="stays")
    roles.note(model.graph.node[0], Role.POOLING)
    onnx.save(model, tmp_path / "model.onnx")
    loaded = ir.load(tmp_path / "model.onnx")
    assert roles.has(loaded.graph[0], Role.POOLING)
    stripped = roles.strip(ir.to_proto(loaded))
    assert [(item.key, item.value) for node in stripped.graph.node for item in node.metadata_props] == [
        ("another", "stays")
    ]


def noted(model: onnx.ModelProto) -> int:
    return sum(item.key == roles.KEY for node in model.graph.node for item in node.metadata_props)


@pytest.mark.parametrize("scheme", ["w8a8-gemm", "rockchip-int8", "w8a8-htp"])
def test_what_is_shipped_holds_no_roles(scheme: str, tmp_path: Path) -> None:
    observed = tiny_integer.calibrated()
    assert noted(observed.model) > 2
    model = quantize(observed.model, observed.statistics, SCHEMES[scheme])[0]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    if scheme == "rockchip-int8":
        assert noted(model) == 0
    else:
        assert noted(model) > 2
        assert noted(backend.flattened(path) if scheme == "w8a8-gemm" else fix_shapes(ir.load(path), 8)) == 0


def decided_by_name(path: Path) -> list[str]:
    """List the calls that ask how a name begins or ends."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_question = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_question and node.func.attr in ("endswith", "startswith"):  # type: ignore[attr-defined]
            asked = ast.unparse(node.func.value)  # type: ignore[attr-defined]
            if "name" in asked.lower() or "Type" in asked or "dtype" in asked.lower():
                found.append(f"{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    return found


def test_no_file_decides_by_how_a_name_begins_or_ends() -> None:
    wrong = []
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / "edgeq" / folder).rglob("*.py")):
            place = path.relative_to(REPOSITORY / "edgeq").as_posix()
            found = decided_by_name(path)
            if len(found) > ALLOWED.get(place, 0):
                wrong += [f"edgeq/{place}:{line}" for line in found]
    assert wrong == []


def test_a_question_about_a_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text('def is_side(node):\n    return str(node.name).endswith("/side")\n')
    assert decided_by_name(path) == ["2: str(node.name).endswith('/side')"]
    path.write_text('def stem(node):\n    return str(node.name).removesuffix("/side")\n')
    assert decided_by_name(path) == []
