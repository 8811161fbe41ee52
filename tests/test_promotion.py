"""An export promotes the products that pay most until its gate holds, and says what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from tiny_bundle import GATE, MEASURES, PLACEMENT, TEXT_SET, make_target

from edgeq.evaluation.gate import judge, share_allowed
from edgeq.pipeline import promotion
from edgeq.quantization.schemes import SCHEMES
from edgeq.quantization.sensitivity import Sensitivity, Site
from edgeq.records import Measures, ParityReport, Scheme

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
