"""The integer-only form: norms apart and constants folded without changing FP32, and codes on every tensor."""

from __future__ import annotations

from functools import partial

import encoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.observe import equal_length_batches, observe
from edgeq.calibration.statistics import Statistics
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import EdgeqError, Unsupported
from edgeq.graph.dataflow import mask_values
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import calibrate
from edgeq.quantization import quantize
from edgeq.quantization.integer import exact_softmax
from edgeq.quantization.qdq import QdqBuilder, symmetric
from edgeq.quantization.rewrites.affine_statistics import affine
from edgeq.quantization.rewrites.center_values import center_values
from edgeq.quantization.rewrites.decompose import DECOMPOSE
from edgeq.quantization.rewrites.fold_norm_bias import fold_norm_bias
from edgeq.quantization.rewrites.scale_outputs import scale_outputs
from edgeq.quantization.schemes import SCHEMES

TOKENS = Tokens(encoder.tokens(3, 40), 0, 0)
# What 32 bits hold exactly, by the end of a node's name, and what reads it.
EXACT = {
    "centred/difference": {"Mul"}, ".masked": {"QuantizeLinear", "ReduceMax", "Sub"},
    "softmax/difference": {"Exp", "QuantizeLinear"},
    "softmax/inverse_3": {"Mul"},
}  # fmt: skip
INTEGER = ("w8a8-int", "w8a8-int-npu", "w8a16-int")


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def embed(model: onnx.ModelProto | ir.Model) -> Embeddings:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = FloatSession.of(proto, optimize=False)
    return embed_batches(session, batches(TOKENS), len(TOKENS.ids))


def cosines(first: Embeddings, second: Embeddings) -> np.ndarray:
    return np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


@pytest.fixture(scope="module")
def calibrated() -> calibrate.Observed:
    return calibrate.calibrate(encoder.encoder(), Tokens(encoder.tokens(1, 64), 0, 0), 0, silent)


@pytest.fixture(scope="module", params=INTEGER)
def qdq(request: pytest.FixtureRequest, calibrated: calibrate.Observed) -> onnx.ModelProto:
    return quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES[request.param])[0]


def clean(model: ir.Model) -> ir.Model:
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    for value in (value for node in model.graph for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    return model


def test_taking_norms_apart_keeps_the_function(calibrated: calibrate.Observed) -> None:
    apart = ir.from_proto(calibrated.model)
    counts = {rewrite.__name__: rewrite(apart).count for rewrite in DECOMPOSE}
    assert (counts["decompose_layer_normalization"], counts["decompose_unit_length"]) == (5, 1)
    left = {node.op_type for node in clean(apart).graph}
    assert not left & {"LayerNormalization", "ReduceL2"}
    assert np.abs(embed(calibrated.model) - embed(apart)).max() < 1e-5


@pytest.mark.parametrize(
    ("fold", "least"),
    [
        (center_values, 2),
        (fold_norm_bias, 9),
        (partial(scale_outputs, quantile=0.5), 4),
    ],
    ids=["center_values", "fold_norm_bias", "scale_outputs"],
)
def test_folding_keeps_the_function_and_its_statistics(calibrated: calibrate.Observed, fold, least: int) -> None:  # type: ignore[no-untyped-def]
    model = ir.from_proto(calibrated.model)
    for rewrite in DECOMPOSE:
        rewrite(model)
    seen = dict(calibrated.statistics)
    assert fold(model, seen).count >= least
    proto = ir.to_proto(clean(model))
    assert np.abs(embed(calibrated.model) - embed(proto)).max() < 1e-5
    # What was derived is what observing the folded model on the same texts gives.
    there = {name for node in proto.graph.node for name in node.output}
    names = [name for name in there & seen.keys() if seen[name] is not calibrated.statistics.get(name)]
    assert names
    held = calibrate._hold_back(Tokens(encoder.tokens(1, 64), 0, 0), 0)[0]
    again = observe(proto, names, equal_length_batches(held, encoder.LONGEST), lambda done, total: None)
    for name in names:
        if seen[name].minimum.shape != again[name].minimum.shape:
            continue  # attention's scalars
        span = float(again[name].maximum.max() - again[name].minimum.min())
        assert np.abs(seen[name].minimum - again[name].minimum).max() < 1e-3 * span, name
        assert np.abs(seen[name].maximum - again[name].maximum).max() < 1e-3 * span, name


def test_every_operator_reads_and_writes_codes(qdq: onnx.ModelProto) -> None:
    made = {output: node.op_type for node in qdq.graph.node for output in node.output}
    readers: dict[str, list[str]] = {}
    for node in qdq.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    followers: dict[str, list[str]] = {}
    for node in qdq.graph.node:
        for name in node.input:
            followers.setdefault(name, []).append(node.name)
    without_codes = {node.output[0] for node in qdq.graph.node if any(map(node.name.endswith, EXACT))}
    without_codes |= {node.input[0] for node in qdq.graph.node if node.name.endswith("centred/difference")}
    stored = {tensor.name for tensor in qdq.graph.initializer}
    of_mask = {value.name for value in mask_values(ir.from_proto(qdq).graph)}
    for node in qdq.graph.node:
        variable = [name for name in node.input if name not in stored]
        if node.output[0] in of_mask:
            continue
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Gather", "Shape", "Slice"):
            continue
        if "/sum" in node.name and node.op_type in ("ReduceSum", "Mul", "Round", "Cast", "Div", "Min"):
            assert node.name.startswith("layer."), node.name  # whole numbers: the sum of a row's codes, to look up by
            continue
        # A bias; codes; the second half of one root. A term of an exact sum has no codes, and the sum has; x less a
        # finer mean is exact, and so are masked scores less the largest and one over their sum.
        known = next((ends for ending, ends in EXACT.items() if node.name.endswith(ending)), None)
        ends = {"Add"} if node.op_type == "Mul" and "Add" in readers[node.output[0]] else known or {"QuantizeLinear"}
        halves = {"MatMul": {"Add"}, "Sqrt": {"Reciprocal"}, "Add": {"Add"}}.get(node.op_type, set())
        whole = {"Sub"} if "centred/difference" in "".join(followers.get(node.output[0], ())) else set()
        assert set(readers[node.output[0]]) <= ends | halves | whole, node.name
        for name in variable:
            begins = {"Add": {"MatMul", "Mul", "Add"}, "Reciprocal": {"Sqrt"}}.get(node.op_type, set())
            exact = {"Add", "Sub"} if name in without_codes else set()
            assert made[name] in {"DequantizeLinear", *begins, *exact}, (node.name, name)


@pytest.mark.parametrize(
    ("scheme", "mean", "least"), [("w8a8-int", 0.985, 0.92), ("w8a8-int-npu", 0.985, 0.92), ("w8a16-int", 0.995, 0.975)]
)
def test_vectors_stay_near_fp32(calibrated: calibrate.Observed, scheme: str, mean: float, least: float) -> None:
    model, products, floats = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES[scheme])
    reference = embed(calibrated.model)
    found = cosines(reference - reference.mean(0), embed(model) - reference.mean(0))
    assert found.mean() > mean
    assert found.min() > least
    assert len(products) == 12 + 4
    assert floats == ()


def test_quantising_twice_gives_the_same_bytes(calibrated: calibrate.Observed) -> None:
    first, second = (
        quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES["w8a8-int"])[0].SerializeToString(
            deterministic=True
        )
        for _ in range(2)
    )
    assert first == second


def test_masked_positions_leave_nothing(qdq: onnx.ModelProto) -> None:
    session = FloatSession.of(qdq, optimize=False)
    short = Tokens(tuple(ids[:9] for ids in encoder.tokens(5, 8)), 0, 0)
    alone = embed_batches(session, batches(short, batch_size=1), 8)
    padded = embed_batches(session, batches(Tokens((*short.ids, tuple(range(1, 41))), 0, 0)), 9)[:8]
    assert cosines(alone, padded).min() > 0.9999


@pytest.mark.parametrize("attention", ["causal", "local"])
def test_what_a_mask_takes_away_widens_no_16bit_scores(attention: str) -> None:
    """A pattern masks scores of every text, so that -10,000 is among those observed; padding does not."""
    tokens = Tokens(encoder.tokens(1, 64), 0, 0)
    seen = calibrate.calibrate(encoder.encoder(attention=attention), tokens, 0, lambda *_: None)
    assert min(float(seen.statistics[f"layer.{layer}.masked"].minimum.min()) for layer in (0, 1)) < -9000.0
    model = quantize.quantize(seen.model, seen.statistics, SCHEMES["w8a16-int"])[0]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    steps = [
        float(stored[node.input[1]]) for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0].endswith(".scores")
    ]  # fmt: skip
    assert len(steps) == 2 and max(steps) < 0.002


def test_a_tensor_without_statistics_is_named(calibrated: calibrate.Observed) -> None:
    seen = {name: item for name, item in calibrated.statistics.items() if not name.endswith("/centred")}
    with pytest.raises(EdgeqError, match="/centred: the calibration has no statistics"):
        quantize.quantize(calibrated.model, seen, SCHEMES["w8a8-int"])


def test_an_operator_without_integer_form_is_named(calibrated: calibrate.Observed) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Erf"
    with pytest.raises(Unsupported, match="Erf has no integer form"):
        quantize.quantize(model, calibrated.statistics, SCHEMES["w8a8-int"])


def test_a_wrong_scale_shows(qdq: onnx.ModelProto, calibrated: calibrate.Observed) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(qdq)
    scale = next(t for t in broken.graph.initializer if t.name == "layer.1.gelu/scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) / 8, scale.name))
    reference = embed(calibrated.model)
    right, wrong = (cosines(reference, embed(model)).mean() for model in (qdq, broken))
    assert wrong < right - 0.01


def test_affine_statistics_are_exact() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 6)).astype(np.float32)
    factor, shift = rng.standard_normal(6), rng.standard_normal(6)

    def seen(values: np.ndarray) -> Statistics:
        moment = (values.T @ values / len(values)).astype(np.float32)
        return Statistics(values.min(0), values.max(0), None, moment, values.mean(0))

    moved, wanted = affine(seen(rows), factor, shift), seen(rows * factor + shift)
    for name in ("minimum", "maximum", "mean", "moment"):
        np.testing.assert_allclose(getattr(moved, name), getattr(wanted, name), atol=1e-4)


@pytest.mark.parametrize("kind", ["Sigmoid", "Tanh", "Erf"])
@pytest.mark.parametrize("scheme", INTEGER)
def test_a_models_own_activation_has_an_integer_form_or_is_named(
    calibrated: calibrate.Observed, kind: str, scheme: str
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.model)
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type = kind
    if kind != "Erf":
        assert quantize.quantize(model, calibrated.statistics, SCHEMES[scheme])[2] == ()
    else:
        with pytest.raises(Unsupported, match=f"{node.name}: Erf has no integer form"):
            quantize.quantize(model, calibrated.statistics, SCHEMES[scheme])


def test_a_right_operand_is_read_without_a_zero_point_once_for_all_readers() -> None:
    left, right = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((2, 2))) for name in "xy")
    makers = [ir.Node("", "Identity", [left], name="narrow"), ir.Node("", "Identity", [right], name="wide")]
    readers = [ir.Node("", "Neg", [makers[0].outputs[0]], name="one"), ir.Node("", "Neg", [makers[1].outputs[0]])]
    for node, name in zip(makers, ("k", "v"), strict=True):
        node.outputs[0].name = name
    graph = ir.Graph([left, right], [node.outputs[0] for node in readers], nodes=[*makers, *readers], name="g")
    seen = Statistics(np.float32([-1.0]), np.float32([3.0]))
    builder = QdqBuilder(graph, {"k": seen, "v": seen})
    for node, bits in zip(makers, (8, 16), strict=True):
        builder.store(node, node.outputs[0], builder.range(node.outputs[0], bits), bits)
        found = builder.read_without_zero_point(node.outputs[0], 8, readers[0])
        assert (found.bits, found.params) == (8, symmetric(3.0, 8))
        assert builder.read_without_zero_point(node.outputs[0], 8, readers[1]) is found
        assert builder.read(node.outputs[0], 8, readers[0]).params.zero_point != 0  # who may have one keeps it
        assert builder.read_without_zero_point(node.outputs[0], 16, readers[0]).params.zero_point == 0


def test_a_mean_is_finer_than_what_it_is_subtracted_from(calibrated: calibrate.Observed) -> None:
    qdq = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES["w8a8-int"])[0]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in qdq.graph.initializer}
    made = {node.output[0]: node for node in qdq.graph.node}
    found = [node for node in qdq.graph.node if node.name.endswith("/centred/difference")]
    assert found  # the test encoder has one residual whose largest values dwarf most tokens
    for node in found:
        whole, mean = (float(stored[made[name].input[1]]) for name in node.input)
        assert np.log2(whole / mean) == round(np.log2(whole / mean)) >= 1.0
        inverse = calibrated.statistics[node.name.replace("/centred/difference", "/inverse")].largest
        channels = calibrated.statistics[node.name.removesuffix("/difference")].minimum.size
        # The error that a token's channels share, over their standard deviation: in a token of little variance.
        assert mean / 2.0 * inverse * np.sqrt(channels) < 2.0**-14 * np.sqrt(channels)


def test_one_level_holds_one_over_each_sum() -> None:
    # Every sum that rows of 1 to 4,095 keys can have, thinned out: exactly one level holds it.
    sums = np.unique(np.geomspace(exact_softmax.UNIT, exact_softmax.UNIT * 4_095, 20_000).astype(np.int64))
    total = np.zeros(len(sums))
    for level in range(exact_softmax.SUM_LEVELS):
        table = exact_softmax.table_of_inverses(level)
        index = np.minimum(sums // exact_softmax.divisor(level), len(table) - 1)
        step = exact_softmax.INVERSE_STEP * (2.0 if level == 0 else 1.0)
        values = table[index] * step
        assert not np.any((values > 0.0) & (total > 0.0))
        total += values
    exact = exact_softmax.UNIT / sums
    rounding = exact_softmax.INVERSE_STEP * 1.01
    assert (np.abs(total - exact) <= exact * 2.0**-11 + rounding).all()


def test_small_sums_of_squares_have_a_range_of_their_own(calibrated: calibrate.Observed) -> None:
    qdq = quantize.quantize(calibrated.model, calibrated.statistics, SCHEMES["w8a16-int"])[0]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in qdq.graph.initializer}
    split = [node.name.removesuffix("/low") for node in qdq.graph.node if node.name.endswith("/squares/low")]
    assert split
    for name in split:
        least = float(calibrated.statistics[name].minimum.min())
        steps = [least / float(stored[f"{each}/scale"]) for each in (name, f"{name}/low")]
        assert steps[0] < 2_048 and steps[1] > 4.0 * steps[0]
