"""The rewrites of schemes run under the same proof as those of float models."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_integer

from edgeq.calibration.statistics import Observed
from edgeq.data.probes import text_probes
from edgeq.errors import EdgeqError
from edgeq.graph.edit import Rewrites
from edgeq.passes.apply import apply_to
from edgeq.passes.drop_unused_nodes import drop_unused_nodes
from edgeq.quantization.quantize import quantize
from edgeq.quantization.rewrites import htp, integer, vendor
from edgeq.quantization.rewrites.integer import integer_passes
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import IntegerSpec

FEEDS = text_probes(tiny_integer.TOKENS.ids)


def halving(model: ir.Model, statistics: Observed) -> Rewrites:
    """Break FP32: multiply one weight by a half, and say nothing of it."""
    weight = next(value for value in model.graph.initializers.values() if str(value.name).endswith("ffn.weight"))
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(0.5), name=weight.name)
    return Rewrites(1)


@pytest.mark.parametrize(
    ("scheme", "module", "replaced"),
    [
        ("w8a8-int", integer, "join_positions"),
        ("w8a8-htp", htp, "center_values"),
        ("rockchip-int8", vendor, "write_norm_defaults"),
    ],
)
def test_a_rewrite_that_changes_fp32_is_caught(
    scheme: str, module: object, replaced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = tiny_integer.calibrated()
    quantize(observed.model, observed.statistics, SCHEMES[scheme], feeds=FEEDS)
    monkeypatch.setattr(module, replaced, halving)
    with pytest.raises(EdgeqError, match="pass halving: moved the FP32 outputs by"):
        quantize(observed.model, observed.statistics, SCHEMES[scheme], feeds=FEEDS)
    quantize(observed.model, observed.statistics, SCHEMES[scheme])  # nothing is proved without feeds


@pytest.mark.parametrize("scheme", ["w8a8-int", "w8a16-int", "w8a8-htp", "w8a16-htp", "rockchip-int8"])
def test_a_proof_changes_no_byte(scheme: str) -> None:
    observed, model = tiny_integer.calibrated(), onnx.ModelProto()
    model.CopyFrom(observed.model)
    for tensor in model.graph.initializer:
        tensor.data_location = onnx.TensorProto.DEFAULT  # as a model has it whose weights lay in files before
    before = model.SerializeToString(deterministic=True)
    proved, trial = (
        quantize(model, observed.statistics, SCHEMES[scheme], feeds=feeds)[0].SerializeToString(deterministic=True)
        for feeds in (FEEDS, ())
    )
    assert proved == trial
    assert model.SerializeToString(deterministic=True) == before


def test_every_rewrite_is_reported_under_its_name() -> None:
    observed = tiny_integer.calibrated()
    form = SCHEMES["w8a8-int"].spec
    assert isinstance(form, IntegerSpec)
    statistics = dict(observed.statistics)
    _, reports = apply_to(observed.model, FEEDS, integer_passes(form), statistics, outputs=1, drops_unused=False)
    done = {report.name: report for report in reports}
    assert len(done) == len(reports)
    assert (done["decompose_layer_normalization"].rewrites, done["center_values"].rewrites) == (5, 2)
    assert done["scale_outputs"].rewrites == 4 and done["repeat_kv_by_gather"].rewrites == 0
    assert 0.0 < max(report.max_abs_error for report in reports) < 1e-5


def test_unused_nodes_are_dropped_and_counted() -> None:
    nodes = [
        onnx.helper.make_node(kind, [source], [name], name=name)
        for kind, source, name in (("Relu", "x", "y"), ("Neg", "x", "a"), ("Exp", "a", "b"))
    ]
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:])))
    assert drop_unused_nodes(model).count == 2
    assert [node.name for node in model.graph] == ["y"]
    assert drop_unused_nodes(model).count == 0


def test_probes_are_whole_texts_with_padding_behind() -> None:
    alone, together = text_probes([[5, 6], [7] * 80, [1, 2, 3], [], [9] * 24])
    assert alone.input_ids.shape == (1, 24) and alone.attention_mask.all()
    assert together.attention_mask.sum(axis=1).tolist() == [2, 3, 24]
    assert together.input_ids[0, :3].tolist() == [5, 6, 0]
    assert text_probes([]) == ()
    assert [feeds.input_ids.shape for feeds in text_probes([[7] * 80, [8] * 90])] == [(1, 80), (1, 80)]
