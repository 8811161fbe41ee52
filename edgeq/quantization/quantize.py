"""Quantise an equalised float model as a scheme says: one entry of `QUANTIZERS` for each kind of scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.errors import Unsupported
from edgeq.quantization.block_weights import quantize_weights, rewrite_weights
from edgeq.quantization.dynamic import quantize_dynamic, rewrite_dynamic
from edgeq.quantization.htp.quantizer import quantize_htp, rewrite_htp
from edgeq.quantization.integer.quantizer import quantize_integer, rewrite_integer
from edgeq.quantization.mixed import quantize_mixed, rewrite_mixed
from edgeq.quantization.qdq import Quantized
from edgeq.quantization.vendor import keep_model, prepare_for_vendor
from edgeq.quantization.walk import Refusal
from edgeq.records import Scheme, SchemeKind


@dataclass(frozen=True)
class Quantizer:
    """Say what a kind of scheme does.

    Attributes:
        quantize: makes the QDQ model from the equalised float model, its statistics and the scheme; collects refusals
            where it is given a list for them, and proves rewrites on probe feeds.
        rewrite: gives the float model whose tensors that QDQ model holds as integers: what layer errors compare with.
        keeps_float: whether tensors stay float beside the integer ones.
        writes_integers: whether the QDQ model holds integers; else a vendor's compiler makes them from the float model.
        may_refuse: whether it refuses models of the dialect for their structure.
        promoted_to: what a promoted product has.
    """

    quantize: Callable[
        [onnx.ModelProto, Mapping[str, Statistics], Scheme, list[Refusal] | None, Sequence[AnyFeeds]], Quantized
    ]
    rewrite: Callable[[onnx.ModelProto, Mapping[str, Statistics], Scheme], onnx.ModelProto]
    keeps_float: bool
    writes_integers: bool
    may_refuse: bool
    promoted_to: str = "16-bit activations"


QUANTIZERS: Mapping[SchemeKind, Quantizer] = {
    "mixed": Quantizer(quantize_mixed, rewrite_mixed, keeps_float=True, writes_integers=True, may_refuse=False),
    "dynamic": Quantizer(quantize_dynamic, rewrite_dynamic, keeps_float=True, writes_integers=True, may_refuse=False),
    "weights": Quantizer(quantize_weights, rewrite_weights, keeps_float=True, writes_integers=True, may_refuse=False),
    "integer": Quantizer(quantize_integer, rewrite_integer, keeps_float=False, writes_integers=True, may_refuse=True),
    "htp": Quantizer(quantize_htp, rewrite_htp, keeps_float=False, writes_integers=True, may_refuse=True),
    "vendor": Quantizer(
        prepare_for_vendor,
        keep_model,
        keeps_float=True,
        writes_integers=False,
        may_refuse=True,
        promoted_to="16-bit floating point",
    ),
}


def quantize(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    refusals: list[Refusal] | None = None,
    feeds: Sequence[AnyFeeds] = (),
) -> Quantized:
    """Turn an equalised float model into a QDQ model by the quantiser of the scheme's kind.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: the calibration's statistics, by tensor.
        scheme: bits, signs, and its kind's own settings.
        refusals: where every reason not to quantise is collected, instead of the first one raised. Statistics may be
            missing then: those tensors are taken to lie between -1 and 1.
        feeds: probe batches on which each of the scheme's rewrites is proved in FP32; none for trials that repeat what
            was proved before.

    Returns:
        The QDQ model, and the names of its integer and float products; the given model where refusals were found.

    Raises:
        Unsupported: the scheme leaves nothing float, and the model holds an operator that has no integer form;
            UnsupportedRange where that follows from what was observed.
        EdgeqError: a tensor has no statistics, or a rewrite changed the FP32 function.
    """
    try:
        return QUANTIZERS[scheme.kind].quantize(model, observed, scheme, refusals, feeds)
    except Unsupported as error:  # by a rewrite, which stops
        if refusals is None:
            raise
        refusals.append(Refusal.of(error))
        return Quantized(model, (), ())
