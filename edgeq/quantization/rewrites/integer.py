"""Bring an equalised float model into the operators that integer-only runtimes have, all exact in FP32."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.quantization.rewrites.decompose_norms import primitives
from edgeq.quantization.rewrites.factor_layernorm_gain import outer_gains
from edgeq.quantization.rewrites.fold_norm_bias import even_values, fold_norm_biases, serve_gains, widen_outputs
from edgeq.quantization.rewrites.join_positions import join_positions
from edgeq.quantization.rewrites.single_token_last_layer import follow_one_token
from edgeq.quantization.rewrites.split_outlier_weights import fine_sides
from edgeq.records import IntegerSpec

FINE_BITS = 8  # of weights, in every scheme that leaves nothing float


def integer_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], form: IntegerSpec
) -> tuple[ir.Model, Observed]:
    """Take norms apart and fold constants, all exact in FP32: what is left is to put codes on every tensor.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the tensors of the model and of its primitives.
        form: says which outputs are scaled down.

    Returns:
        A float model with `sentence_embedding` as its one output, and the statistics of its tensors.
    """
    seen: Observed = dict(observed)
    graph_model = ir.from_proto(model)
    graph = graph_model.graph
    del graph.outputs[1:]
    primitives(graph_model)
    serve_gains(graph, seen)
    join_positions(graph)
    even_values(graph, seen)
    fold_norm_biases(graph, seen)
    if form.gemm_bits == 8:
        widen_outputs(graph, seen, form.scaled_output_quantile)
    if form.sum_bits == 32:
        outer_gains(graph, seen)
    fine_sides(graph, seen, FINE_BITS)
    RemoveUnusedNodesPass()(graph_model)
    TopologicalSortPass()(graph_model)
    if follow_one_token(graph_model, seen):
        RemoveUnusedNodesPass()(graph_model)
        TopologicalSortPass()(graph_model)
    return graph_model, seen
