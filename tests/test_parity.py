from __future__ import annotations

import encoder
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_bundle import GATE, MEASURES, PLACEMENT, TEXT_SET, make_target

from edgeq.data.sessions import embed_batches, unit
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import ConfigError, ParityFailed
from edgeq.evaluation import gate, parity
from edgeq.evaluation.vector_measures import mean_interval, rank_correlation
from edgeq.graph.float_session import FloatSession
from edgeq.quantization import schemes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import Gate
from edgeq.targets import list_targets

COUNT, DIM = 300, 64


def unit_rows(count: int = COUNT, dim: int = DIM, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def one_way(rows: np.ndarray, common: float = 0.95) -> np.ndarray:
    """Turn unit rows so that each has the same large component: all vectors point one way."""
    direction = unit_rows(1, rows.shape[1], seed=4)
    rest = rows - (rows @ direction.T) * direction
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    return (common * direction + np.sqrt(1.0 - common**2) * rest).astype(np.float32)


def near(reference: np.ndarray) -> np.ndarray:
    rows = reference + 1e-4 * np.random.default_rng(9).standard_normal(reference.shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ran_on_a_device(limits: Gate) -> Gate:
    return limits.model_copy(update={"export_run_kinds": ("device",)})


def texts(count: int = COUNT) -> list[str]:
    return [f"text {number}" for number in range(count)]


# One target for each gate: targets of one kind of scheme share it.
TARGETS = {target.name: target for target in {target.gate: target for target in list_targets()}.values()}
# Whose artifacts may be held against a QDQ model that is measured in their place.
JUDGED_BY_CODES = tuple(
    name for name, target in TARGETS.items() if QUANTIZERS[schemes.find(target.scheme, name).kind].writes_integers
)
REFERENCES = {"everywhere": unit_rows(), "one way": one_way(unit_rows())}


def failures(
    reference: np.ndarray, embeddings: np.ndarray, invariance_min: float = 1.0, name: str | None = None
) -> tuple[str, ...]:
    target = make_target() if name is None else TARGETS[name]
    report = parity.report(
        target, "device", PLACEMENT, reference, embeddings, texts(len(reference)), TEXT_SET, invariance_min
    )
    assert report.status == ("failed" if report.failures else "passed")
    return report.failures


@pytest.mark.parametrize("spread", REFERENCES)
@pytest.mark.parametrize("name", TARGETS)
def test_close_vectors_pass_the_gate(name: str, spread: str) -> None:
    reference = REFERENCES[spread]
    assert failures(reference, near(reference), name=name) == ()


def swapped(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[[3, 7]] = changed[[7, 3]]
    return changed


def sign_of_one_channel(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[:, 5] *= -1
    return changed


def scale_of_one_channel(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[:, 5] *= 1.5
    return changed


def scale_of_one_channel_normalised(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[:, 5] *= 2.5
    return changed / np.linalg.norm(changed, axis=1, keepdims=True)


def scale_of_each_channel(rows: np.ndarray) -> np.ndarray:
    return rows * np.linspace(0.7, 1.3, rows.shape[1], dtype=np.float32)


def one_nan(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[11, 2] = np.nan
    return changed


def one_infinity(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[11, 2] = np.inf
    return changed


def constant(rows: np.ndarray) -> np.ndarray:
    return np.tile(rows[:1], (len(rows), 1))


def zeros(rows: np.ndarray) -> np.ndarray:
    return np.zeros_like(rows)


def lost(rows: np.ndarray, cosine: float) -> np.ndarray:
    """Turn one row, less the mean of all, to another of this cosine with it."""
    mean = rows.mean(axis=0)
    row = rows[9] - mean
    side = rows[20] - mean
    side -= (side @ row) / (row @ row) * row
    side *= np.linalg.norm(row) / np.linalg.norm(side)
    changed = rows.copy()
    changed[9] = mean + cosine * row + np.sqrt(1.0 - cosine**2) * side
    return changed / np.linalg.norm(changed, axis=1, keepdims=True)


DAMAGES = (
    (swapped, "cosine min"),
    (np.negative, "cosine mean"),
    (sign_of_one_channel, "cosine m"),
    (scale_of_one_channel, "norm error"),
    (scale_of_one_channel_normalised, "cosine m"),
    (scale_of_each_channel, "cosine m"),
    (lambda rows: rows * np.float32(1.01), "norm error"),
    (lambda rows: rows[::-1], "cosine mean"),
    (lambda rows: np.roll(rows, 1, axis=1), "cosine mean"),
    (one_nan, "NaN or infinity for 1 of 300 texts, first for text 12"),
    (one_infinity, "NaN or infinity"),
    (constant, "Spearman"),
    (lambda rows: lost(rows, 0.955), "centred cosine min"),
    (zeros, "cosine mean"),
    (lambda rows: rows[:-1], "shape (299, 64)"),
    (lambda rows: rows[:, :-1], "shape (300, 63)"),
    (lambda rows: rows[:, None, :], "shape (300, 1, 64)"),
    (lambda rows: rows.ravel(), "shape (19200,)"),
)


@pytest.mark.parametrize("spread", REFERENCES)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_every_damage_fails_the_gate(damage, named: str, name: str, spread: str) -> None:  # type: ignore[no-untyped-def]
    reference = REFERENCES[spread]
    missed = failures(reference, damage(near(reference)), name=name)
    # Where all point one way, another limit may be the one that is missed.
    assert any(named in sentence or spread == "one way" for sentence in missed), missed


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("invariance_min", [0.98, 0.0])
def test_a_vector_that_moves_with_its_padding_fails_each_gate(name: str, invariance_min: float) -> None:
    reference = unit_rows()
    missed = failures(reference, near(reference), invariance_min, name)
    assert [line.split(" is ")[0] for line in missed] == ["invariance"]


@pytest.mark.parametrize("spread", REFERENCES)
@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES])
def test_every_damage_of_the_artifact_alone_fails_each_gate(damage, spread: str) -> None:  # type: ignore[no-untyped-def]
    """Measure the sound QDQ model in the artifact's place, as on emulators: what ran must be exact."""
    reference = REFERENCES[spread]

    def refused_by(vectors: np.ndarray) -> set[str]:
        held = parity.OwnVectors(tuple(range(COUNT)), vectors)
        report = parity.report(
            make_target(), "device", PLACEMENT, reference, near(reference), texts(), TEXT_SET, 1.0, own=held
        )  # fmt: skip
        return {
            name for name in JUDGED_BY_CODES
            if gate.judge_report(report.model_copy(update={"gate": ran_on_a_device(TARGETS[name].gate)}), PLACEMENT)
        }  # fmt: skip

    assert refused_by(near(reference)) == set()
    assert refused_by(damage(near(reference))) == set(JUDGED_BY_CODES)


@pytest.mark.parametrize("invariance_min", [0.9999, 0.0])
def test_a_vector_that_depends_on_its_batch_fails_the_gate(invariance_min: float) -> None:
    reference = unit_rows()
    assert [line.split(" is ")[0] for line in failures(reference, near(reference), invariance_min)] == ["invariance"]


def test_measures_of_a_known_case() -> None:
    reference = np.eye(4, dtype=np.float32)
    embeddings = reference.copy()
    embeddings[2] = [0, 0, 0.8, 0.6]
    measured = parity.measure(reference, embeddings, ["a", "b", "c" * 200, "d"], 1.0)
    assert measured.cosine_min == pytest.approx(0.8)
    assert measured.cosine_mean == pytest.approx(0.95)
    assert measured.max_abs_error == pytest.approx(0.6)
    assert measured.worst_text == "c" * 80
    assert measured.norm_error_max == pytest.approx(0.0, abs=1e-6)


def test_the_norm_is_compared_with_fp32s_own() -> None:
    reference = unit_rows() * np.linspace(0.5, 9, COUNT, dtype=np.float32)[:, None]
    assert parity.measure(reference, reference, texts(), 1.0).norm_error_max < 1e-6
    assert parity.measure(reference, reference * np.float32(1.02), texts(), 1.0).norm_error_max == pytest.approx(
        0.02, rel=1e-3
    )


def test_top10_overlap_counts_shared_neighbours() -> None:
    reference, other = unit_rows(), unit_rows(seed=5)
    similarities = [rows @ rows.T - 9 * np.eye(COUNT) for rows in (reference, other)]
    nearest = [np.argsort(-values, axis=1)[:, :10] for values in similarities]
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*nearest, strict=True)])
    measured = parity.measure(reference, other, texts(), 1.0)
    assert measured.top10_overlap == pytest.approx(expected)
    assert 0.0 < expected < 0.2


@pytest.mark.parametrize("count", [3, 10, 11])
def test_few_texts_compare_all_their_neighbours(count: int) -> None:
    reference = unit_rows(count)
    assert parity.measure(reference, reference, texts(count), 1.0).top10_overlap == 1.0


def test_many_texts_are_measured_in_blocks() -> None:
    reference = unit_rows(3300, 8)
    measured = parity.measure(reference, reference, texts(3300), 1.0)
    assert measured.top10_overlap == 1.0
    assert measured.spearman == pytest.approx(1.0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_two_texts_are_too_few(count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} texts"):
        parity.measure(unit_rows(count), unit_rows(count), texts(count), 1.0)


def test_a_damaged_reference_is_not_compared_with() -> None:
    reference = unit_rows()
    with pytest.raises(ParityFailed, match="FP32 gave NaN"):
        parity.measure(one_nan(reference), reference, texts(), 1.0)
    with pytest.raises(ParityFailed, match="text 1: FP32's vector is zero"):
        parity.measure(zeros(reference), reference, texts(), 1.0)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_agrees_with_its_definition(ties: bool) -> None:
    generator = np.random.default_rng(3)
    first, second = generator.standard_normal(300), generator.standard_normal(300)
    second += first
    if ties:
        first, second = np.round(first), np.round(second)

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])

    expected = np.corrcoef(ranks(first), ranks(second))[0, 1]
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12)
    assert 0.4 < expected < 0.9


def test_rank_correlation_of_a_constant_is_zero() -> None:
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0.0
    assert rank_correlation(np.ones(5), np.ones(5)) == 0.0


def test_every_limit_is_judged() -> None:
    assert gate.judge(MEASURES, PLACEMENT, GATE, "device") == ()
    worse = {
        "centred_cosine_mean_low": (
            0.9984,
            "centred cosine mean is 0.999100, and 0.998400 at the worse end of its interval; at least 0.9985 is "
            "needed: undecided: about 185 more texts.",
        ),
        "centred_cosine_p01": (
            0.99, "centred cosine of the lowest hundredth is 0.990000; at least 0.995 is needed.",
        ),
        "centred_cosine_min": (0.99, "centred cosine min is 0.990000; at least 0.993 is needed."),
        "regret_mean_high": (
            0.0025,
            "regret@10 mean is 0.001000, and 0.002500 at the worse end of its interval; at most 0.002 is allowed: "
            "undecided: about 640 more texts.",
        ),
        "regret_p99": (0.03, "regret@10 of the highest hundredth is 0.030000; at most 0.02 is allowed."),
        "spearman": (0.98, "Spearman of pairwise similarities is 0.980000; at least 0.99 is needed."),
        "invariance_min": (0.9999, "invariance is 0.999900; at least 0.99999 is needed."),
        "norm_error_max": (0.01, "norm error is 1.00e-02 of FP32's norm; at most 0.001 is allowed."),
        "texts": (255, "measured on 255; at least 256 are needed: undecided: about 1 more."),
    }  # fmt: skip
    for field, (value, sentence) in worse.items():
        assert gate.judge(MEASURES.model_copy(update={field: value}), PLACEMENT, GATE, "device") == (sentence,)
        damaged = MEASURES.model_copy(update={field: float("nan")})
        assert field == "texts" or len(gate.judge(damaged, PLACEMENT, GATE, "device")) == 1


@pytest.mark.parametrize("field", ["cosine_mean", "cosine_min", "top10_overlap", "max_abs_error"])
def test_what_is_only_shown_judges_nothing(field: str) -> None:
    assert gate.judge(MEASURES.model_copy(update={field: 0.1}), PLACEMENT, GATE, "device") == ()


def test_a_mean_below_its_limit_is_missed_and_not_undecided() -> None:
    changes = {"centred_cosine_mean": 0.998, "centred_cosine_mean_low": 0.9979, "centred_cosine_mean_high": 0.9986}
    poor = MEASURES.model_copy(update=changes)
    (sentence,) = gate.judge(poor, PLACEMENT, GATE, "device")
    assert sentence == "centred cosine mean is 0.998000; at least 0.9985 is needed."
    assert gate.further_texts(poor, GATE) is None


def test_further_texts_are_asked_for_only_where_they_decide() -> None:
    assert gate.further_texts(MEASURES, GATE) is None
    wide = MEASURES.model_copy(update={"regret_mean_high": 0.0025})
    assert gate.further_texts(wide, GATE) == 640
    for lost in ({"centred_cosine_min": 0.5}, {"invariance_min": 0.5}, {"norm_error_max": 0.5}):
        assert gate.further_texts(wide.model_copy(update=lost), GATE) is None


def test_the_interval_narrows_with_more_texts_and_depends_on_nothing_else() -> None:
    reference = unit_rows(1200)
    found = reference + 0.02 * np.random.default_rng(1).standard_normal(reference.shape).astype(np.float32)
    few, many = (parity.measure(reference[:count], found[:count], texts(count), 1.0) for count in (300, 1200))
    for each in (few, many):
        assert each.centred_cosine_mean_low < each.centred_cosine_mean < each.centred_cosine_mean_high
        assert each.regret_mean_low < each.regret_mean < each.regret_mean_high
    widths = [each.centred_cosine_mean_high - each.centred_cosine_mean_low for each in (few, many)]
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.15)  # as 1 / sqrt(texts)
    assert parity.measure(reference, found, texts(1200), 1.0) == many


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(2).standard_normal(400)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_regret_is_what_its_formula_says() -> None:
    reference, other = unit_rows(50), unit_rows(50, seed=5)
    similarities = reference @ reference.T
    expected = []
    for row in range(50):
        others = [place for place in range(50) if place != row]
        best = sorted(others, key=lambda place: -similarities[row, place])[:10]  # noqa: B023
        taken = sorted(others, key=lambda place: -float(other[row] @ other[place]))[:10]  # noqa: B023
        most, found = (sum(similarities[row, place] for place in rows) for rows in (best, taken))  # noqa: B023
        expected.append((most - found) / (most - 10 * np.mean([similarities[row, place] for place in others])))
    measured = parity.measure(reference, other, texts(50), 1.0)
    assert measured.regret_mean == pytest.approx(np.mean(expected), rel=1e-5)
    assert measured.regret_p99 == pytest.approx(max(expected), rel=1e-5)
    assert 0.8 < measured.regret_mean < 1.2  # as good as chance
    assert parity.measure(reference, reference, texts(50), 1.0).regret_p99 == 0.0


def test_a_lost_text_shows_where_all_vectors_point_one_way() -> None:
    reference = one_way(unit_rows())
    found = lost(near(reference), 0.958)
    measured = parity.measure(reference, found, texts(), 1.0)
    assert measured.cosine_min > 0.992
    assert measured.centred_cosine_min == pytest.approx(0.958, abs=2e-3)
    for name, target in TARGETS.items():
        assert any("centred cosine min" in line for line in failures(reference, found, name=name)), target.name


def test_an_offset_that_all_vectors_share_counts() -> None:
    reference = unit_rows()
    offset = reference + 0.3 * unit_rows(1, seed=8)
    assert parity.measure(reference, offset, texts(), 1.0).centred_cosine_mean < 0.98


def test_vectors_of_one_direction_cannot_be_compared_with() -> None:
    with pytest.raises(ParityFailed, match="one direction"):
        parity.measure(constant(unit_rows()), unit_rows(), texts(), 1.0)


def test_the_qdq_model_is_measured_and_the_artifact_held_to_it() -> None:
    reference = unit_rows()
    qdq, rows = near(reference), tuple(range(0, COUNT, 10))

    def judged(own: np.ndarray) -> tuple[str, ...]:
        held = parity.OwnVectors(rows, own)
        report = parity.report(
            make_target(), "device", PLACEMENT, reference, qdq, texts(), TEXT_SET, 1.0, own=held
        )  # fmt: skip
        assert report.measured == "qdq-model"
        assert report.exactness is None or report.exactness.texts == len(rows)
        return report.failures

    assert judged(qdq[list(rows)]) == ()
    (sentence,) = judged(lost(qdq, 0.98)[list(rows)] if 9 in rows else swapped(qdq[list(rows)]))
    assert sentence.startswith("exactness: centred cosine with the QDQ model is ")
    assert any("norm error" in line for line in judged(qdq[list(rows)] * np.float32(1.01)))
    assert any("NaN" in line for line in judged(np.full_like(qdq[list(rows)], np.nan)))


def test_a_model_that_does_not_normalise_has_a_norm_limit_of_its_own() -> None:
    drifted = MEASURES.model_copy(update={"is_normalized": False, "norm_error_max": 0.04})
    assert gate.judge(drifted, PLACEMENT, GATE, "device") == ()
    (sentence,) = gate.judge(drifted.model_copy(update={"norm_error_max": 0.06}), PLACEMENT, GATE, "device")
    assert sentence == "norm error is 6.00e-02 of FP32's norm; at most 0.05 is allowed."


def test_whether_a_model_normalises_is_read_from_its_vectors() -> None:
    reference = unit_rows()
    assert parity.measure(reference, reference, texts(), 1.0).is_normalized
    longer = reference * np.float32(1.5)
    assert not parity.measure(longer, longer, texts(), 1.0).is_normalized


def test_float_fallbacks_are_judged_by_name() -> None:
    placement = PLACEMENT.model_copy(update={"float_fallbacks": ("layer.3.query",)})
    (sentence,) = gate.judge(MEASURES, placement, GATE, "device")
    assert "layer.3.query" in sentence


def test_the_place_is_judged() -> None:
    (sentence,) = gate.judge(MEASURES, PLACEMENT, GATE, "emulator")
    assert sentence == "it ran on emulator; for export device or host-kernels is needed."


TABLE = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
SOME = Tokens(tuple(tuple(range(1, 1 + length)) for length in (1, 2, 3, 5, 8, 13, 21, 30, 31, 32)), 0, 0)


def faithful(feeds):  # type: ignore[no-untyped-def]
    return (TABLE[feeds.input_ids] * feeds.attention_mask[..., None]).sum(axis=1)


def test_a_faithful_session_is_invariant_and_sees_every_padding_and_order() -> None:
    runs: list[tuple[tuple[int, ...], int]] = []

    def watched(feeds):  # type: ignore[no-untyped-def]
        runs.append((tuple(feeds.attention_mask.sum(axis=1).tolist()), feeds.input_ids.shape[1]))
        return faithful(feeds)

    assert parity.invariance(watched, SOME, 32) == pytest.approx(1.0, abs=1e-6)
    batches = [lengths for lengths, width in runs if len(lengths) == 8 and width == 32]
    assert len(batches) == 2
    assert batches[0] == batches[1][::-1] == tuple(sorted(batches[0]))
    assert {width for lengths, width in runs if lengths == (5,)} == {5, 6, 12, 8, 32}
    assert {width for lengths, width in runs if lengths == (32,)} == {32}
    assert ((5, 5), 5) in runs


def test_static_buckets_see_only_their_own_lengths() -> None:
    def static(feeds):  # type: ignore[no-untyped-def]
        assert feeds.input_ids.shape[1] in (8, 32)
        return faithful(feeds)

    assert parity.invariance(static, SOME, 32, buckets_tokens=(8, 32)) == pytest.approx(1.0, abs=1e-6)


def padding_leaks(feeds):  # type: ignore[no-untyped-def]
    return TABLE[feeds.input_ids].mean(axis=1)


def batch_leaks(feeds):  # type: ignore[no-untyped-def]
    return faithful(feeds) + 0.2 * faithful(feeds).mean(axis=0)


def order_leaks(feeds):  # type: ignore[no-untyped-def]
    return faithful(feeds) + 0.3 * np.arange(len(feeds.input_ids))[:, None]


@pytest.mark.parametrize("session", [padding_leaks, batch_leaks, order_leaks])
def test_a_leak_between_paddings_or_texts_is_seen(session) -> None:  # type: ignore[no-untyped-def]
    assert parity.invariance(session, SOME, 32) < 0.999


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_vectors_without_a_direction_give_zero(bad: float) -> None:
    def session(feeds):  # type: ignore[no-untyped-def]
        vectors = faithful(feeds)
        if feeds.input_ids.shape[1] == 8:
            vectors[:] = bad
        return vectors

    assert parity.invariance(session, SOME, 32) == 0.0


def test_invariance_needs_a_text() -> None:
    with pytest.raises(ConfigError, match="no texts"):
        parity.invariance(faithful, Tokens((), 0, 0), 32)


def at_4_bits(model: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """Round the weights of a layer's products to 4 bits for each output channel."""
    damaged = onnx.ModelProto()
    damaged.CopyFrom(model)
    weights = {node.input[1] for node in damaged.graph.node if node.op_type == "MatMul" and node.name.startswith(layer)}
    rounded = 0
    for tensor in damaged.graph.initializer:
        if tensor.name in weights:
            values = numpy_helper.to_array(tensor)
            step = np.abs(values).max(axis=0) / 7
            tensor.CopyFrom(numpy_helper.from_array((np.round(values / step) * step).astype(np.float32), tensor.name))
            rounded += 1
    assert rounded >= 6
    return damaged


def test_one_layer_at_4_bits_is_refused_by_each_gate() -> None:
    model, samples = encoder.encoder(0), Tokens(encoder.tokens(1, COUNT), 0, 0)
    reference, found = (
        embed_batches(FloatSession.of(each), batches(samples), COUNT) for each in (model, at_4_bits(model, "layer.1"))
    )
    assert np.sum(unit(reference) * unit(found), axis=1).min() > 0.9
    for name in TARGETS:
        missed = failures(reference, found, name=name)
        assert any("centred cosine" in line for line in missed), (name, missed)
