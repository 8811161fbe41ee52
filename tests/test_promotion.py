"""An export promotes the products that pay most until its gate holds, and says what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from tiny_bundle import GATE, MEASURES, PLACEMENT, TEXT_SET, make_target

from edgeq.evaluation.gate import judge, share_allowed
from edgeq.pipeline import promotion
from edgeq.quantization import schemes
from edgeq.quantization.schemes import SCHEMES
from edgeq.quantization.sensitivity import Sensitivity, Site
from edgeq.records import Measures, ParityReport, Promotion, Scheme

SITES = (
    Site(names=("ffn_out",), channels=40, outputs=10, loss=4e-4),
    Site(names=("query", "key"), channels=10, outputs=20, loss=3e-4),
    Site(names=("ffn",), channels=10, outputs=40, loss=1e-4),
)
SENSITIVITY = Sensitivity(scheme="w8a8-gemm", texts=8, loss=1e-3, rest=2e-4, sites=SITES, steps=())
SCHEME = SCHEMES["w8a8-gemm"]


@dataclass(frozen=True)
class Attempt:
    report: ParityReport
    size_bytes: int = 1000


def losing(share: float) -> Measures:
    """Give measures whose mean loss is this much of what the gate allows."""
    mean = 1.0 - share * (1.0 - GATE.centred_cosine_mean_min)
    return MEASURES.model_copy(update={"centred_cosine_mean": mean, "centred_cosine_mean_low": mean})


def attempt(measures: Measures | None, size_bytes: int = 1000) -> Attempt:
    failures = judge(measures, PLACEMENT, GATE, "device") if measures else ("nothing came out.",)
    report = ParityReport(
        target=make_target().name, ran_on="device", machine="a machine", status="failed" if failures else "passed",
        measures=measures, gate=GATE, failures=failures, texts=TEXT_SET,
    )  # fmt: skip
    return Attempt(report, size_bytes)


@dataclass
class Model:
    """Stand in for an export: its loss follows from what is promoted, as the sites say, times `harder`."""

    loss: float
    harder: float = 1.0
    tried: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, scheme: Scheme) -> Attempt:
        self.tried.append(scheme.promoted)
        sites = [site for site in SITES if set(site.names) <= set(scheme.promoted)]
        left = SENSITIVITY.share_left(sites)
        return attempt(losing(self.loss * (1.0 - (1.0 - left) / self.harder)), 1010)


def never() -> Sensitivity:
    raise AssertionError("nothing is to be ranked")


def test_what_passes_is_left_alone() -> None:
    first = attempt(MEASURES)
    assert promotion.until_passed(first, SCHEME, Model(1.0), never) == (first, None)


@pytest.mark.parametrize("update", [{"invariance_min": 0.9}, {"norm_error_max": 0.5}])
def test_what_no_promotion_mends_is_refused_as_it_is(update: dict[str, float]) -> None:
    first = attempt(losing(2.0).model_copy(update=update))
    assert first.report.failures
    assert promotion.until_passed(first, SCHEME, Model(1.0), never) == (first, None)
    broken = attempt(None)
    assert promotion.until_passed(broken, SCHEME, Model(1.0), never) == (broken, None)


def test_the_fewest_products_are_promoted_that_the_estimate_asks_for() -> None:
    model = Model(1.2)
    last, made = promotion.until_passed(attempt(losing(1.2)), SCHEME, model, lambda: SENSITIVITY)
    assert last.report.status == "passed"
    assert model.tried == [("key", "query")]  # 3e-4 of 200 multiplications before 4e-4 of 400
    assert made is not None
    assert (made.products, made.of_products, made.extra_bytes) == (("key", "query"), 4, 10)
    assert made.extra_multiplications == pytest.approx(200 / 1000)
    assert made.missed_before == attempt(losing(1.2)).report.failures


def test_an_estimate_that_was_too_good_is_mended_by_what_was_measured() -> None:
    model = Model(1.2, harder=2.0)
    last, made = promotion.until_passed(attempt(losing(1.2)), SCHEME, model, lambda: SENSITIVITY)
    assert last.report.status == "passed"
    assert model.tried == [("key", "query"), ("ffn_out", "key", "query")]
    assert made is not None and made.products == model.tried[-1]


def test_where_all_products_do_not_suffice_the_last_attempt_is_refused_with_its_measures() -> None:
    model = Model(50.0)
    last, made = promotion.until_passed(attempt(losing(50.0)), SCHEME, model, lambda: SENSITIVITY)
    assert last.report.status == "failed"
    assert model.tried == [("ffn", "ffn_out", "key", "query")]
    assert made is not None and made.extra_multiplications == 1.0


WEIGHTS = (5e-5, 6e-5, 4e-5)  # of the 2e-4 that stay with all products promoted


@dataclass
class Floats(Model):
    """Stand in for an export whose products and tables can stay float."""

    measured: Sensitivity = SENSITIVITY
    weights: tuple[float, ...] = WEIGHTS
    schemes: list[Scheme] = field(default_factory=list)

    def __call__(self, scheme: Scheme) -> Attempt:
        self.schemes.append(scheme)
        promoted, floats = (
            [site for site in self.measured.sites if set(site.names) <= set(names)]
            for names in (scheme.promoted, scheme.floats)
        )
        lost = dict(zip((site.names for site in self.measured.sites), self.weights, strict=True))
        left = promotion.share_left(self.measured, promoted, floats, lost)
        if scheme.embedding_bits == schemes.FLOAT_BITS:
            left -= (self.measured.rest - sum(self.weights)) / self.measured.loss
        return attempt(losing(self.loss * (1.0 - (1.0 - left) / self.harder)), 1010)


def test_where_all_promoted_do_not_suffice_the_most_costly_products_stay_float() -> None:
    model = Floats(5.5)  # two elevenths may stay, and a fifth stays with all products promoted
    last, made = promotion.until_passed(attempt(losing(5.5)), SCHEME, model, lambda: SENSITIVITY, lambda _: WEIGHTS)
    assert last.report.status == "passed"
    (scheme,) = model.schemes  # promoting alone is not even tried
    assert scheme.floats == ("ffn_out",) and set(scheme.promoted) == {"ffn", "key", "query"}
    assert scheme.name == "w8a8-gemm+3+1float" and schemes.is_form(scheme, SCHEME)
    assert made is not None and (made.floats, made.products, made.of_products) == (("ffn_out",), scheme.promoted, 4)
    assert made.extra_multiplications == pytest.approx((200 + 400 + 3 * 400) / 1000)
    assert made.sentence.startswith(
        "promoted 3 of 4 products to 16-bit activations and left 1 of 4 products in float (ffn_out) (+0.00 MB, +180 %"
    )
    assert "tables" not in made.sentence


def test_products_beside_float_ones_are_promoted_only_where_that_is_needed() -> None:
    sites = (SITES[0].model_copy(update={"loss": 9e-5}), *SITES[1:])
    measured = SENSITIVITY.model_copy(update={"rest": 9e-4, "sites": sites})  # weights lose most of it
    model = Floats(2.0, measured=measured, weights=(1e-5, 8e-4, 1e-5))
    _, made = promotion.until_passed(attempt(losing(2.0)), SCHEME, model, lambda: measured, lambda _: model.weights)
    assert made is not None and (made.floats, made.products) == (("key", "query"), ())
    assert model.schemes[0].name == "w8a8-gemm+0+2float"
    assert made.sentence.startswith("left 2 of 4 products in float (key, query)")


def test_the_last_try_is_fp32_with_its_tables() -> None:
    model = Floats(1e6)
    last, made = promotion.until_passed(attempt(losing(1e6)), SCHEME, model, lambda: SENSITIVITY, lambda _: WEIGHTS)
    assert last.report.status == "passed"
    assert [scheme.embedding_bits for scheme in model.schemes] == [8, 32]
    assert model.schemes[-1].name == "w8a8-gemm+0+4float+tables" and schemes.is_form(model.schemes[-1], SCHEME)
    assert made is not None and made.has_float_tables and made.extra_multiplications == pytest.approx(3.0)
    assert made.sentence.startswith("left 4 of 4 products and the embedding tables in float (+0.00 MB")


def test_a_sentence_names_eight_float_products_and_counts_the_rest() -> None:
    made = Promotion(
        products=(), floats=tuple("abcdefghij"), of_products=12, extra_bytes=0, extra_multiplications=0.5,
        missed_before=("everything.",),
    )  # fmt: skip
    assert made.sentence == (
        "left 10 of 12 products in float (a, b, c, d, e, f, g, h, and 2 more) (+0.00 MB, +50 % multiplications); "
        "without, everything."
    )


def test_an_estimate_that_was_too_good_takes_twice_as_many_float_products() -> None:
    model = Floats(5.5, harder=1.05)
    last, made = promotion.until_passed(attempt(losing(5.5)), SCHEME, model, lambda: SENSITIVITY, lambda _: WEIGHTS)
    assert last.report.status == "passed"
    assert [len(scheme.floats) for scheme in model.schemes] == [1, 3]
    assert made is not None and made.floats == ("ffn_out", "key", "query")


@pytest.mark.parametrize(("name", "tries"), [("w8a8-int", 2), ("w8a8-htp", 2), ("w8a8-int-npu", 1)])
def test_where_nothing_may_stay_float_everything_gets_16_bits(name: str, tries: int) -> None:
    model = Model(50.0)
    scheme = SCHEMES[name]
    tried = []

    def again(form: Scheme) -> Attempt:
        tried.append(form)
        assert schemes.is_form(form, scheme) and schemes.base_name(form) == name
        return attempt(MEASURES) if form.activation_bits == 16 else model(form)

    last, made = promotion.until_passed(attempt(losing(50.0)), scheme, again, lambda: SENSITIVITY)
    assert len(tried) == tries and last.report.status == ("passed" if tries == 2 else "failed")
    assert made is not None and len(made.products) == 4
    assert ("and all else with them" in made.sentence) == (tries == 2)
    if tries == 2:
        assert tried[-1].spec == SCHEMES[name.replace("w8a8", "w8a16")].spec and tried[-1].name == f"{name}+16bit"


@pytest.mark.parametrize("name", ["w8a16-int", "w8a16-htp", "rockchip-float16"])
def test_where_every_product_reads_16_bits_already_nothing_is_tried(name: str) -> None:
    first = attempt(losing(2.0))
    assert promotion.until_passed(first, SCHEMES[name], Model(1.0), never) == (first, None)


def test_convolutions_are_not_promoted_and_may_stay_float() -> None:
    maps = tuple(site.model_copy(update={"is_convolution": True}) for site in SITES)
    measured = SENSITIVITY.model_copy(update={"sites": maps})
    model = Floats(1.2, measured=measured)
    last, made = promotion.until_passed(attempt(losing(1.2)), SCHEME, model, lambda: measured, lambda _: WEIGHTS)
    assert last.report.status == "passed" and made is not None
    assert (made.floats, made.products) == (("ffn_out",), ())


def test_the_share_that_may_stay_follows_from_the_limit_that_is_missed_most() -> None:
    def share(measures: Measures) -> float | None:
        return share_allowed(attempt(measures).report)

    assert share(MEASURES) is None
    assert share(losing(2.0)) == pytest.approx(0.5)
    worse = losing(2.0).model_copy(update={"regret_p99": 4 * GATE.regret_p99_max})
    assert share(worse) == pytest.approx(0.25)
    wide = MEASURES.model_copy(update={"centred_cosine_mean_low": 1.0 - 4 * (1.0 - GATE.centred_cosine_mean_min)})
    assert share(wide) == pytest.approx(0.25)  # the worse end of the interval has to meet the limit


def test_a_failure_that_is_no_limit_on_many_texts_is_not_promoted_for() -> None:
    report = attempt(losing(2.0)).report
    fallback = report.model_copy(update={"failures": (*report.failures, "1 weight products run in float.")})
    assert share_allowed(report) == pytest.approx(0.5)
    assert share_allowed(fallback) is None
