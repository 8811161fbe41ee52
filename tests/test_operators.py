"""The table of operators: quantisers and TFLite writers take exactly what it says, and no row is half done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx
import onnx_ir as ir
import pytest
from tiny_integer import BUCKETS, calibrated

from edgeq.errors import Unsupported
from edgeq.graph import operators
from edgeq.graph.operators import OPERATORS, Operator
from edgeq.quantization import quantize
from edgeq.quantization.htp.quantizer import HTP_QUANTIZERS
from edgeq.quantization.integer.quantizer import INTEGER_QUANTIZERS
from edgeq.quantization.schemes import SCHEMES
from edgeq.quantization.walk import move

SCHEMES_TRIED = ("w8a8-int", "w8a8-int-npu", "w8a16-int")
COMPUTED = ("computed", "rewritten")
COPYING = ("layout", "selection", "repetition", "extremum")


def functions(quantizers: Mapping[str, Callable[..., None]]) -> frozenset[str]:
    """Name the operators for which a quantiser has a function of its own."""
    return frozenset(name for name, function in quantizers.items() if function is not move)


def gaps(
    table: Mapping[str, Operator],
    integer_only: Collection[str],
    for_htp: Collection[str],
    writers: Collection[str] | None = None,
) -> list[str]:
    """List what is missing between the table, the functions of the two quantisers, and TFLite's writers."""
    found = [f"{name}: the table has no row" for name in {*integer_only, *for_htp, *(writers or ())} - set(table)]
    for name, row in table.items():
        if not (row.why or row.written_by):
            found.append(f"{name}: no float model holds it, and nothing writes it")
        for quantiser, support, functions in (("integer", row.integer, integer_only), ("htp", row.htp, for_htp)):
            if (support in COMPUTED) is not (name in functions):
                found.append(f"{name}: {quantiser} is {support!r}, and the function is {name in functions}")
            if support == "copied" and row.kind not in COPYING:
                found.append(f"{name}: {quantiser} copies a scale over new numbers")
            if support == "computed" and row.kind in ("arithmetic", "activation") and not row.observed:
                found.append(f"{name}: {quantiser} needs statistics that calibration does not keep")
        if writers is not None and row.integer and name not in writers:
            found.append(f"{name}: an integer-only model may hold it, and TFLite has no writer")
    return found


def test_the_quantisers_take_what_the_table_says() -> None:
    assert gaps(OPERATORS, functions(INTEGER_QUANTIZERS), functions(HTP_QUANTIZERS)) == []


@pytest.mark.tflite
def test_tflite_writes_what_an_integer_only_model_may_hold() -> None:
    lowering = pytest.importorskip("edgeq.backends.tflite.lowering", reason="needs the extra `tflite`")
    written = {*lowering.WRITERS, *lowering._NOTHING_TO_WRITE}
    assert gaps(OPERATORS, functions(INTEGER_QUANTIZERS), functions(HTP_QUANTIZERS), written) == []
    # What only the mask and sizes are made of is computed while lowering, and a float model may hold it.
    assert set(lowering.WRITERS) <= operators.INTEGER | operators.of_kind("quantization")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (Operator("activation"), "Softsign: no float model holds it, and nothing writes it"),
        (Operator("activation", "x", integer="computed", observed=True), "Softsign: integer is 'computed'"),
        (Operator("activation", "x", htp="computed", observed=True), "Softsign: htp is 'computed'"),
        (Operator("activation", "x", integer="computed"), "Softsign: integer needs statistics"),
        (Operator("activation", "x", integer="copied"), "Softsign: integer copies a scale over new numbers"),
        (Operator("activation", "x", integer="computed", observed=True), "Softsign: an integer-only model may hold it"),
    ],
)
def test_a_row_without_what_it_promises_is_named(row: Operator, found: str) -> None:
    table = {**OPERATORS, "Softsign": row}
    assert any(each.startswith(found) for each in gaps(table, operators.INTEGER_COMPUTED, operators.HTP_COMPUTED, ()))


def test_a_function_without_a_row_is_named() -> None:
    known = operators.INTEGER_COMPUTED, operators.HTP_COMPUTED
    assert gaps(OPERATORS, *known) == []
    assert gaps(OPERATORS, known[0] | {"Softsign"}, known[1]) == ["Softsign: the table has no row"]
    assert gaps(OPERATORS, known[0] | {"Erf"}, known[1]) == ["Erf: integer is '', and the function is True"]


@pytest.mark.tflite
@pytest.mark.parametrize("scheme", SCHEMES_TRIED)
@pytest.mark.parametrize("kind", sorted(operators.ACTIVATIONS))
def test_an_activation_becomes_known_kernels_or_is_refused_by_name(kind: str, scheme: str) -> None:
    lowering = pytest.importorskip("edgeq.backends.tflite.lowering", reason="needs the extra `tflite`")
    from edgeq.backends.tflite import kernels
    from edgeq.backends.tflite.emitter import Settings

    observed = calibrated()
    model = onnx.ModelProto()
    model.CopyFrom(observed.model)
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type = kind
    if not OPERATORS[kind].integer:
        with pytest.raises(Unsupported, match=f"{kind} has no integer form"):
            quantize.quantize(model, observed.statistics, SCHEMES[scheme])
        return
    qdq = quantize.quantize(model, observed.statistics, SCHEMES[scheme])[0]
    data = lowering.lower_model(ir.from_proto(qdq), BUCKETS[:1], Settings(32, "quantize", "none"))
    assert kernels.violations(kernels.read(data), "litert") == []


def test_scales_are_copied_where_values_only_move() -> None:
    assert operators.HTP_COPIED - operators.INTEGER_COPIED == {"GatherElements"}  # products by distance
    assert operators.INTEGER_COPIED - operators.HTP_COPIED == {"MaxPool"}  # maps of images go to LiteRT
    assert {"Add", "Cast", "Concat", "Neg", "Pad"}.isdisjoint(operators.INTEGER_COPIED | operators.HTP_COPIED)


def test_the_dialect_leaves_out_what_only_rewrites_write() -> None:
    assert {"Gemm", "LpNormalization", "ReduceSumSquare", "QuantizeLinear"}.isdisjoint(operators.DIALECT)
    assert all(operators.DIALECT.values())
