"""`check` says of every architecture what quantising and lowering do, on every backend; no compiler is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.export, pytest.mark.tflite]
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

import architectures  # noqa: E402
import measured_architecture as measured  # noqa: E402
import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402

from edgeq import targets  # noqa: E402
from edgeq.backends.contract import PlansOperators  # noqa: E402
from edgeq.backends.registry import find  # noqa: E402
from edgeq.data.tokens import bucket_lengths  # noqa: E402
from edgeq.errors import Unsupported, UnsupportedRange  # noqa: E402
from edgeq.pipeline.check import Checked, check_float_model  # noqa: E402
from edgeq.quantization.quantize import quantize  # noqa: E402
from edgeq.quantization.schemes import SCHEMES  # noqa: E402
from edgeq.quantization.walk import Refusal  # noqa: E402
from edgeq.records import Target  # noqa: E402

# One for each backend and scheme.
TARGETS = (
    "x86-64-onnxruntime", "intel-openvino-cpu", "android-litert", "raspberry-pi-tflite-runtime", "integer-only-w8a16",
    "ethos-u55-256", "ethos-u85-256", "snapdragon-8-gen-3", "snapdragon-8-gen-3-w8a8", "rk3588", "rk3588-float16",
)  # fmt: skip


@pytest.fixture(scope="module", params=architectures.ARCHITECTURES)
def made(
    request: pytest.FixtureRequest, exported_architecture: Callable[[str], measured.Exported]
) -> measured.Exported:
    return exported_architecture(request.param)


@pytest.fixture(scope="module")
def checked(made: measured.Exported) -> dict[str, Checked]:
    found = check_float_model(
        made.model, measured.NOWHERE, made.record.max_sequence, [targets.load_target(name) for name in TARGETS]
    )
    return {item.target: item for item in found}


@pytest.fixture(scope="module")
def quantized(made: measured.Exported) -> Callable[[str], tuple[Any, list[Refusal]]]:
    """Quantise by a scheme, once for the targets that share it, and collect what refuses."""

    @functools.cache
    def collecting(scheme: str) -> tuple[Any, list[Refusal]]:
        collected: list[Refusal] = []
        return quantize(made.observed.model, made.observed.statistics, SCHEMES[scheme], collected), collected

    return collecting


@pytest.fixture(scope="module")
def raised(made: measured.Exported) -> Callable[[str], Unsupported | None]:
    """Quantise by a scheme as `export` does, once for the targets that share it, and give what it raises."""

    @functools.cache
    def raising(scheme: str) -> Unsupported | None:
        try:
            quantize(made.observed.model, made.observed.statistics, SCHEMES[scheme])
        except Unsupported as error:
            return error
        return None

    return raising


def refusals(
    made: measured.Exported, target: Target, quantized: Callable[[str], tuple[Any, list[Refusal]]]
) -> list[str]:
    """List what quantising and lowering refuse on a real calibration, but for what depends on ranges."""
    backend = find(target.backend, target.name)
    model, collected = quantized(target.scheme)
    if collected:
        return [item.sentence for item in collected if item.is_certain]
    if not isinstance(backend, PlansOperators):
        return []
    bucket = max(bucket_lengths(target.buckets_tokens, made.record.max_sequence))
    plan = backend.planned(ir.from_proto(model.model), bucket, target)
    on_host = ", ".join(f"{item.operator} ({item.output})" for item in plan.on_host)
    limit = target.gate.host_operators_max
    return [
        *plan.problems,
        *(
            [f"{len(plan.on_host)} operators stay on the host ({on_host}); at most {limit} may."]
            * (len(plan.on_host) > limit)
        ),
    ]


@pytest.mark.parametrize("name", TARGETS)
def test_check_gives_the_refusals_of_quantising_and_lowering(
    made: measured.Exported,
    checked: dict[str, Checked],
    quantized: Callable[[str], tuple[Any, list[Refusal]]],
    name: str,
) -> None:
    wanted = dict.fromkeys(refusals(made, targets.load_target(name), quantized))
    said = dict.fromkeys(checked[name].problems)
    # Whether an outlier branch is there, and with it a copy of 8 bits in 16, depends on ranges: a kernel for it that a
    # runtime lacks may be met by a calibration and not by random texts.
    of_ranges = {problem for problem in wanted if "from int8 to int16 is not known to be right" in problem}
    assert [problem for problem in wanted if problem not in of_ranges or problem in said] == list(said)


@pytest.mark.parametrize("name", TARGETS)
def test_export_raises_one_of_them_or_nothing(
    checked: dict[str, Checked], raised: Callable[[str], Unsupported | None], name: str
) -> None:
    error = raised(targets.load_target(name).scheme)
    if isinstance(error, UnsupportedRange):
        assert not checked[name].problems
    elif error is not None:
        assert str(error) in checked[name].problems
    else:
        assert all("no form" not in problem and "no integer form" not in problem for problem in checked[name].problems)


def test_the_architectures_that_litert_takes_are_not_refused(
    checked: dict[str, Checked], made: measured.Exported
) -> None:
    """What the first `check` refused, from a table of operator names of its own, and `export` converted."""
    if made.name in ("bert", "roberta", "modernbert", "t5", "llama", "clip-text"):
        assert checked["android-litert"].problems == ()


def test_another_operator_is_named(made: measured.Exported) -> None:
    """The comparison above has seen a difference: an operator that no backend of integers takes."""
    changed = onnx.ModelProto()
    changed.CopyFrom(made.model)
    node = next((node for node in changed.graph.node if node.op_type in ("Gelu", "Relu", "Sigmoid", "Tanh")), None)
    if node is None:
        pytest.skip(f"{made.name} has no activation of one operator")
    node.op_type = "HardSigmoid"
    del node.attribute[:]
    (found,) = check_float_model(
        changed, measured.NOWHERE, made.record.max_sequence, [targets.load_target("android-litert")]
    )
    assert any("HardSigmoid" in problem for problem in found.problems)
