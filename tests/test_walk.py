"""One walk for every kind of scheme: what a kind is stands in few files, and refusals are raised or collected alike."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import tiny_integer

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.errors import Unsupported, UnsupportedRange
from edgeq.quantization.quantize import QUANTIZERS, quantize
from edgeq.quantization.schemes import SCHEMES
from edgeq.quantization.walk import Refusal
from edgeq.records import DynamicSpec, HtpSpec, IntegerSpec, MixedSpec, SchemeKind, VendorSpec, WeightsSpec

EDGEQ = Path(__file__).resolve().parent.parent / "edgeq"
SPECS = (MixedSpec, DynamicSpec, WeightsSpec, IntegerSpec, HtpSpec, VendorSpec)
# What a new kind of scheme edits: these, the module that quantises by it, and the backend that takes it.
KNOW_KINDS = {"records/__init__.py", "quantization/quantize.py", "quantization/schemes.py"}
MAY_KNOW_ONE = (
    "quantization/integer/",
    "quantization/htp/",
    "quantization/rewrites/",
    "quantization/block_weights.py",
    "quantization/vendor.py",
    "backends/",
)
REFUSING = ("w8a8-int", "w8a8-int-npu", "w8a16-int", "w8a8-htp")


def mentions(source: str) -> Iterator[str]:
    """Give each class of settings that a file names, and each kind that it compares or looks up by name."""
    names = {spec.__name__ for spec in SPECS}
    kinds = set(get_args(SchemeKind))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.alias) and (node.id if isinstance(node, ast.Name) else node.name) in names:
            yield node.id if isinstance(node, ast.Name) else node.name
        if isinstance(node, ast.Compare | ast.Subscript | ast.MatchValue):
            parts = [child for child in ast.walk(node) if isinstance(child, ast.Constant) and child.value in kinds]
            is_kind = any(isinstance(child, ast.Attribute) and child.attr == "kind" for child in ast.walk(node))
            yield from (str(part.value) for part in parts if is_kind)


def test_every_kind_has_a_quantiser_and_its_settings() -> None:
    kinds = set(get_args(SchemeKind))
    assert set(QUANTIZERS) == kinds == {scheme.kind for scheme in SCHEMES.values()}
    assert kinds == {spec.model_fields["kind"].default for spec in SPECS}


def test_few_files_know_a_kind_of_scheme_by_name() -> None:
    found = {
        path.relative_to(EDGEQ).as_posix(): sorted(set(mentions(path.read_text(encoding="utf-8"))))
        for path in EDGEQ.rglob("*.py")
    }
    assert {name for name, said in found.items() if said and not name.startswith(MAY_KNOW_ONE)} == KNOW_KINDS - {
        "quantization/quantize.py"  # by the keys of QUANTIZERS alone
    }


@pytest.mark.parametrize(
    "source",
    ["if scheme.kind == 'htp': pass", "isinstance(scheme.spec, HtpSpec)", "from edgeq.records import VendorSpec"],
)
def test_a_file_that_asks_for_a_kind_is_found(source: str) -> None:
    assert list(mentions(source))
    assert not list(mentions("column['integer'] = kinds[0]"))


def with_operators(changes: dict[str, str]) -> onnx.ModelProto:
    """Give the equalised encoder with the operators of some nodes replaced."""
    model = onnx.ModelProto()
    model.CopyFrom(tiny_integer.calibrated().model)
    for node in model.graph.node:
        node.op_type = changes.get(node.name, node.op_type)
    return model


def refusals(model: onnx.ModelProto, observed: Observed, scheme: str) -> list[Refusal]:
    found: list[Refusal] = []
    quantize(model, observed, SCHEMES[scheme], found)
    return found


def unsupported() -> dict[str, str]:
    """Give the names of two nodes of the encoder, and an operator for each that no scheme quantises."""
    nodes = tiny_integer.calibrated().model.graph.node
    first = next(node.name for node in nodes if node.op_type == "Gelu" and "/side" not in node.name)
    second = [node.name for node in nodes if node.op_type == "Softmax"][-1]
    return {first: "Erf", second: "LogSoftmax"}


@pytest.mark.parametrize("scheme", REFUSING)
def test_all_refusals_are_collected_in_the_words_that_are_raised_one_after_another(scheme: str) -> None:
    observed = tiny_integer.calibrated().statistics
    changes, said = unsupported(), []
    for fixed in unsupported():
        with pytest.raises(Unsupported) as raised:
            quantize(with_operators(changes), observed, SCHEMES[scheme])
        said.append(str(raised.value))
        changes.pop(fixed)
    found = refusals(with_operators(unsupported()), observed, scheme)
    assert [(item.node, item.operator) for item in found] == list(unsupported().items())
    assert [item.sentence for item in found] == said and all(item.is_certain for item in found)
    assert refusals(with_operators({}), observed, scheme) == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("layer.1.sum", "its factors are too large for its range"),
        ("layer.1.ffn_out.out", "its terms differ too much in size for a 32-bit sum"),
    ],
)
def test_what_ranges_do_not_allow_is_no_certain_refusal(name: str, sentence: str) -> None:
    calibrated = tiny_integer.calibrated()
    seen = calibrated.statistics[name]
    huge = Statistics(seen.minimum * np.float32(1e12), seen.maximum * np.float32(1e12))
    observed = {**calibrated.statistics, name: huge}
    with pytest.raises(UnsupportedRange, match=sentence) as raised:
        quantize(calibrated.model, observed, SCHEMES["w8a8-int"])
    found = refusals(calibrated.model, observed, "w8a8-int")
    assert found[0].sentence == str(raised.value) and not found[0].is_certain
