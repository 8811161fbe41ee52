"""Define what parity is judged by, what was measured, and the report of both."""

from __future__ import annotations

from typing import Literal

from edgeq.records.record import Record
from edgeq.records.samples import ImageSet, TextSet
from edgeq.records.source import EndToEnd

RunKind = Literal["device", "host-kernels", "emulator", "simulator", "not-run"]
Status = Literal["passed", "failed", "not-run"]


_NAMED = 8  # float products in a sentence; the record holds all


class Gate(Record):
    """Hold the limits that parity measures are judged by, and the kinds of run that suffice."""

    centred_cosine_mean_min: float  # cosine with FP32's vector, both less FP32's mean: mean over the texts
    centred_cosine_p01_min: float  # of the lowest hundredth of the texts
    centred_cosine_min_min: float  # of the worst text
    regret_mean_max: float  # of regret@10: FP32 similarity lost by taking the artifact's ten nearest
    regret_p99_max: float  # of the highest hundredth of the texts
    spearman_min: float  # of pairwise similarities, artifact against FP32
    invariance_min: float  # cosine of one text at other paddings and batches
    norm_error_max: float  # relative to FP32's norm, for models that L2-normalise
    norm_error_unnormalized_max: float  # the same for models that do not, whose norm has the vector's error
    exactness_min: float  # centred cosine of each vector with that of the QDQ model or the exporting machine
    float_fallbacks_max: int
    host_operators_max: int  # operators per file that an accelerator's compiler leaves to the CPU
    export_run_kinds: tuple[RunKind, ...]
    release_run_kinds: tuple[RunKind, ...]
    parity_texts: int | None = None  # at most so many texts run in the artifact, where one takes seconds; None: all


class Measures(Record):
    """Hold the parity measures of an artifact's vectors against FP32's; the last four are shown and not judged.

    `_low` and `_high` are the ends of a mean's 95 % bootstrap interval.
    """

    texts: int
    centred_cosine_mean: float
    centred_cosine_mean_low: float
    centred_cosine_mean_high: float
    centred_cosine_p01: float  # the lowest hundredth
    centred_cosine_min: float
    regret_mean: float
    regret_mean_low: float
    regret_mean_high: float
    regret_p99: float  # the highest hundredth
    spearman: float
    invariance_min: float
    norm_error_max: float  # relative to FP32's norm
    is_normalized: bool  # whether all FP32 vectors have length 1
    worst_text: str  # beginning of the text with the lowest centred cosine
    max_abs_error: float
    cosine_mean: float
    cosine_min: float
    top10_overlap: float


class Exactness(Record):
    """Hold how near vectors are to those that another run of the same codes gave."""

    texts: int
    centred_cosine_mean: float
    centred_cosine_min: float
    max_abs_error: float


class SettingReport(Record):
    """Hold the measures of the same artifact with another runtime setting, or the reason why there are none."""

    name: str  # e.g. "inference_precision_hint=bf16"
    ran_on: RunKind
    measures: Measures | None  # None when not measured
    reason: str | None  # why it was not measured


class Promotion(Record):
    """Say which weight products an export promoted so that the gate holds, which stay float, and what that cost.

    `extra_multiplications` estimates the time: a promoted product counts twice, a float one as four integer ones.
    """

    products: tuple[str, ...]  # promoted
    floats: tuple[str, ...] = ()  # the last resort: with float weights and inputs
    has_float_tables: bool = False  # whether the embedding tables stay float, too
    of_products: int
    promoted_to: str = "16-bit activations"
    extra_bytes: int  # of the artifact's files
    extra_multiplications: float  # the share that this adds to all products'
    missed_before: tuple[str, ...]  # the limits that the artifact misses without

    @property
    def sentence(self) -> str:
        """Say what was promoted, what it cost, and what was missed without."""
        return f"{self.done}; without, {' '.join(self.missed_before)}"

    @property
    def done(self) -> str:
        """Say what was promoted and what it cost."""
        done = []
        if self.products:
            done.append(f"promoted {len(self.products)} of {self.of_products} products to {self.promoted_to}")
        if self.floats:
            tables = " and the embedding tables" if self.has_float_tables else ""
            shown = ", ".join(self.floats[:_NAMED])
            more = f", and {len(self.floats) - _NAMED} more" if len(self.floats) > _NAMED else ""
            named = "" if self.has_float_tables else f" ({shown}{more})"
            done.append(f"left {len(self.floats)} of {self.of_products} products{tables} in float{named}")
        return (
            f"{' and '.join(done)} "
            f"({self.extra_bytes / 1e6:+.2f} MB, {100 * self.extra_multiplications:+.0f} % multiplications)"
        )


class ParityReport(Record):
    """Hold an artifact's parity measures, and one sentence for each limit of the gate that they miss.

    A report without `measures` is `not-run` or `failed`, never `passed`. Where a run takes seconds, the measures are
    those of the QDQ model in ONNX Runtime (`measured`), with the artifact's own invariance and norms, and `exactness`
    says how near the artifact's vectors are to the QDQ model's. `other_settings` must meet the gate except its limit on
    invariance, and do not replace a run with the target's own settings.
    """

    target: str
    ran_on: RunKind
    machine: str
    status: Status
    measures: Measures | None  # None when not run
    gate: Gate
    failures: tuple[str, ...]
    texts: TextSet | ImageSet
    measured: Literal["artifact", "qdq-model"] = "artifact"  # whose vectors the measures are of
    exactness: Exactness | None = None  # the artifact's vectors of some of the texts against the QDQ model's
    reason: str | None = None  # why it was not run; such a bundle cannot be released
    other_settings: tuple[SettingReport, ...] = ()
    end_to_end: EndToEnd = EndToEnd(status="not compared", reason="the report was made without it")
    promotion: Promotion | None = None  # what the export promoted so that the gate holds
