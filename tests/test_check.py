"""What a check says of each operator before anything is converted, and when it refuses."""

from __future__ import annotations

from pathlib import Path

import encoder
import onnx
import pytest

from edgeq import cli, targets
from edgeq.backends.registry import BACKENDS
from edgeq.data.probes import random_images
from edgeq.errors import ConfigError, Unsupported, UnsupportedRange
from edgeq.pipeline import check as checking
from edgeq.quantization.integer.int32_sums import Int32Sums
from edgeq.records import Target
from edgeq.system.cache import Cache

ORT = "x86-64-onnxruntime"
ERF = "layer.0.gelu: Erf has no integer form; use a scheme that leaves it float"


class Silent:
    """A backend that has no rules and plans nothing."""

    def rejections(self, model: object, target: object) -> tuple[()]:
        return ()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Target:
    """Give a target of that backend, integer-only."""
    monkeypatch.setitem(BACKENDS, "silent", Silent())  # type: ignore[arg-type]
    return targets.load_target(ORT).model_copy(update={"backend": "silent", "scheme": "w8a8-int"})


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
    assert {item.why for item in found.operators} == {"an integer product", "stays float"}


def test_an_operator_outside_the_dialect_stays_float_or_is_refused(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Atan"
    onnx.save(model, path)
    found = check(path, targets.load_target(ORT), tmp_path)
    assert [item.why for item in found.operators if item.operator == "Atan"] == [
        "a float island: outside the dialect, it stays float"
    ]
    assert not found.problems
    refused = check(path, targets.load_target("android-litert"), tmp_path)
    assert [item.operator for item in refused.operators if item.verdict == "refused"] == ["Atan"]
    with pytest.raises(Unsupported, match=r"android-litert: Atan \(layer\.0\.gelu\): outside .* leaves nothing float"):
        checking.require((refused,))
    gelu.domain = "own"
    model.opset_import.add(domain="own", version=1)
    onnx.save(model, path)
    found = check(path, targets.load_target(ORT), tmp_path)
    assert [item.operator for item in found.operators if item.verdict == "refused"] == ["Atan"]
    with pytest.raises(Unsupported, match=r"x86-64-onnxruntime: the graph leaves the dialect .*gelu: op own::Atan"):
        checking.require((found,))


def test_a_backend_that_plans_nothing_is_judged_by_rewriting_and_quantising(
    path: Path, tmp_path: Path, silent: Target
) -> None:
    assert set(by_verdict(check(path, silent, tmp_path))) == {"supported"}
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Erf"
    onnx.save(model, path)
    assert check(path, silent, tmp_path).problems == (ERF,)


def test_every_refusal_is_collected_and_none_is_repeated(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    first, second = (node for node in model.graph.node if node.op_type == "Gelu")
    first.op_type, second.op_type = "Erf", "HardSigmoid"
    onnx.save(model, path)
    refused = check(path, targets.load_target(HTP), tmp_path)
    assert [problem.partition(" (")[0] for problem in refused.problems] == [first.name, second.name]
    assert {item.operator for item in refused.operators if item.verdict == "refused"} == {"Erf", "HardSigmoid"}


def test_what_follows_from_ranges_is_possible_and_no_problem(
    path: Path, tmp_path: Path, silent: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise UnsupportedRange("its terms differ too much in size")

    monkeypatch.setattr(Int32Sums, "quantize", refuse)
    found = check(path, silent, tmp_path)
    assert found.problems == () and found.possible_problems == ("its terms differ too much in size",)
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


@pytest.mark.parametrize(("domain", "code"), [("", 0), ("own", 4)])
def test_the_verb_exits_with_what_it_found(
    path: Path, domain: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Gelu").domain = domain
    model.opset_import.add(domain="own", version=1)
    onnx.save(model, path)
    assert cli.run(["check", str(path), "--target", ORT]) == code
    out, err = capsys.readouterr()
    assert "LayerNormalization" in out
    assert ("leaves the dialect" in err) == (code == 4)


HTP = "snapdragon-8-gen-3"


def test_htp_takes_the_encoder_and_names_what_it_does_not(path: Path, tmp_path: Path) -> None:
    found = check(path, targets.load_target(HTP), tmp_path)
    assert set(by_verdict(found)) == {"supported"} and found.problems == ()
    assert {item.why for item in found.operators} == {"integer"}
    model = onnx.load(path)
    (gelu, *_) = (node for node in model.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Erf"
    onnx.save(model, path)
    refused = check(path, targets.load_target(HTP), tmp_path)
    (problem,) = refused.problems
    assert problem.startswith(f"{gelu.name} (Erf, near layer.0.ffn_out): Erf has no form for HTP. Targets for LiteRT")


def test_htp_takes_attention_that_looks_back_only_and_refuses_what_positions_do_not_say(
    path: Path, tmp_path: Path
) -> None:
    onnx.save(encoder.encoder(attention="causal"), path)
    assert check(path, targets.load_target(HTP), tmp_path).problems == ()
    model = encoder.encoder()
    (shifted,) = (node for node in model.graph.node if node.op_type == "Sub" and node.input[0] != "input_ids")
    limit = onnx.helper.make_node("Mul", [shifted.input[0], shifted.input[0]], ["kept"], name="kept")
    model.graph.node.insert(list(model.graph.node).index(shifted), limit)
    shifted.input[0] = "kept"
    onnx.save(model, path)
    problems = check(path, targets.load_target(HTP), tmp_path).problems
    assert len(problems) == 2 and all("masked by more than padding and positions" in problem for problem in problems)


@pytest.mark.tflite
@pytest.mark.parametrize("name", ["android-litert", "raspberry-pi-tflite-runtime", "integer-only-w8a16"])
def test_integer_only_targets_take_the_encoder(path: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    found = check(path, targets.load_target(name), tmp_path)
    assert by_verdict(found).keys() == {"supported"}
    assert found.problems == ()
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Erf"
    onnx.save(model, path)
    refused = check(path, targets.load_target(name), tmp_path)
    assert refused.problems == (ERF,)


@pytest.mark.ethos_u
@pytest.mark.parametrize(
    ("name", "left"),
    [("ethos-u55-256", {"CAST", "GATHER"}), ("ethos-u65-512", {"CAST", "GATHER"}), ("ethos-u85-256", set())],
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
        listed = "GATHER (looked_up), CAST (attention_mask/narrow)"
        assert problems == (f"2 operators stay on the host ({listed}); at most 0 may.",)


def test_a_scheme_that_the_npu_cannot_take_is_refused_by_its_rule_alone(path: Path, tmp_path: Path) -> None:
    target = targets.load_target("ethos-u55-256").model_copy(update={"scheme": "w8a16-int"})
    (problem,) = check(path, target, tmp_path).problems
    assert "16-bit products, GELU, tables" in problem


def test_random_images_are_batched_and_chosen_as_images_are() -> None:
    samples = random_images((3, 8, 8))
    assert len(samples.chosen([0, 2])) == 2
    assert [batch.feeds.size for batch in samples.unpadded(2)] == [2, 2, 1]
    assert samples.unpadded(2)[0].feeds.named(["pixel_values"])["pixel_values"].shape == (2, 3, 8, 8)
