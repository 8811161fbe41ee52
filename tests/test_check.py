"""What a check says of each operator before anything is converted, and when it refuses."""

from __future__ import annotations

from pathlib import Path

import encoder
import numpy as np
import onnx
import pytest

from edgeq import cli, targets
from edgeq.backends.registry import BACKENDS
from edgeq.errors import ConfigError, Unsupported
from edgeq.pipeline import check as checking
from edgeq.records import Target
from edgeq.system.cache import Cache

ORT = "x86-64-onnxruntime"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(encoder.encoder(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def check(path: Path, target: Target, cache: Path) -> checking.Checked:
    (found,) = checking.check(str(path), (target,), None, Cache(cache))
    return found


def by_verdict(found: checking.Checked) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for item in found.operators:
        groups.setdefault(item.verdict, set()).add(item.operator)
    return groups


def count(path: Path) -> int:
    return len(onnx.load(path).graph.node)


def test_onnxruntime_takes_every_operator(path: Path, tmp_path: Path) -> None:
    found = check(path, targets.load_target(ORT), tmp_path)
    assert set(by_verdict(found)) == {"supported"}
    assert sum(item.count for item in found.operators) == count(path)
    assert found.problems == ()
    products = [item for item in found.operators if item.why == "an integer product"]
    assert [item.operator for item in products] == ["MatMul"]


def test_an_operator_outside_the_dialect_is_refused(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Sinh"
    onnx.save(model, path)
    found = check(path, targets.load_target(ORT), tmp_path)
    assert [item.operator for item in found.operators if item.verdict == "refused"] == ["Sinh"]
    with pytest.raises(Unsupported, match=r"x86-64-onnxruntime: Sinh \(.*gelu\): is not in the dialect"):
        checking.require((found,))


def test_a_backend_without_rules_says_that_it_does_not_know(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def rejections(self, model: object, target: object) -> tuple[()]:
            return ()

    monkeypatch.setitem(BACKENDS, "silent", Silent())  # type: ignore[arg-type]
    found = check(path, targets.load_target(ORT).model_copy(update={"backend": "silent"}), tmp_path)
    assert set(by_verdict(found)) == {"unknown"}
    assert "silent has no rules for single operators" in found.operators[0].why
    checking.require((found,))


def test_a_rule_on_the_target_is_a_problem(path: Path, tmp_path: Path) -> None:
    target = targets.load_target(ORT)
    found = check(path, target.model_copy(update={"scheme": "w8a8-int"}), tmp_path)
    assert found.problems
    with pytest.raises(Unsupported, match="cannot be converted as the targets ask"):
        checking.require((found,))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        checking.check(str(tmp_path / "nowhere"), (targets.load_target(ORT),), None, Cache(tmp_path))


@pytest.mark.parametrize(("op_type", "code"), [("Gelu", 0), ("Sinh", 4)])
def test_the_verb_exits_with_what_it_found(
    path: Path, op_type: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = op_type
    onnx.save(model, path)
    assert cli.run(["check", str(path), "--target", ORT]) == code
    out, err = capsys.readouterr()
    assert "LayerNormalization" in out
    assert ("is not in the dialect" in err) == (code == 4)


HTP = "snapdragon-8-gen-3"


def test_htp_takes_the_encoder_and_names_what_it_does_not(path: Path, tmp_path: Path) -> None:
    found = check(path, targets.load_target(HTP), tmp_path)
    assert set(by_verdict(found)) == {"supported"} and found.problems == ()
    assert {"becomes Gemm", "becomes a part of LpNormalization"} <= {item.why for item in found.operators}
    model = onnx.load(path)
    (gelu, *_) = (node for node in model.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Erf"
    onnx.save(model, path)
    refused = check(path, targets.load_target(HTP), tmp_path)
    assert refused.problems == (f"Erf ({gelu.name}): Erf has no form for HTP.",)


def test_htp_refuses_attention_that_looks_back_only(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    (shifted,) = (node for node in model.graph.node if node.op_type == "Sub" and node.input[0] != "input_ids")
    limit = onnx.helper.make_node("Mul", [shifted.input[0], "looks_back"], ["kept"], name="kept")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "looks_back"))
    model.graph.node.insert(list(model.graph.node).index(shifted), limit)
    shifted.input[0] = "kept"
    onnx.save(model, path)
    found = check(path, targets.load_target(HTP), tmp_path)
    assert len(found.problems) == 2 and all("causal or local attention" in problem for problem in found.problems)


@pytest.mark.tflite
@pytest.mark.parametrize("name", ["android-litert", "raspberry-pi-tflite-runtime", "integer-only-w8a16"])
def test_integer_only_targets_take_the_encoder(path: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    found = check(path, targets.load_target(name), tmp_path)
    assert by_verdict(found).keys() <= {"supported", "unknown"}
    assert found.problems == ()
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Erf"
    onnx.save(model, path)
    refused = check(path, targets.load_target(name), tmp_path)
    assert "Erf (layer.0.gelu): Erf has no integer form." in refused.problems


@pytest.mark.ethos_u
@pytest.mark.parametrize(
    ("name", "left"),
    [("ethos-u55-256", {"Cast", "Gather"}), ("ethos-u65-512", {"Cast", "Gather"}), ("ethos-u85-256", set())],
)
def test_ethos_u_says_what_stays_on_the_host(path: Path, tmp_path: Path, name: str, left: set[str]) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `ethos-u`")
    target = targets.load_target(name)
    found = check(path, target, tmp_path)
    assert by_verdict(found).get("on-host", set()) == left
    assert len(found.host_operators) == len(left)
    assert found.problems == ()
    strict = target.model_copy(update={"gate": target.gate.model_copy(update={"host_operators_max": 0})})
    problems = check(path, strict, tmp_path).problems
    assert len(problems) == bool(left)
    if left:
        assert "2 operators stay on the host (CAST (mask), GATHER (looked_up)); at most 0 may." == problems[0]


@pytest.mark.ethos_u
def test_a_scheme_that_the_npu_cannot_take_is_refused_with_what_would_stay(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `ethos-u`")
    target = targets.load_target("ethos-u55-256").model_copy(update={"scheme": "w8a16-int"})
    found = check(path, target, tmp_path)
    assert {"Gelu", "LayerNormalization", "MatMul"} <= by_verdict(found)["on-host"]
    assert any("16-bit products, GELU, tables" in problem for problem in found.problems)
