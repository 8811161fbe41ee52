"""Rewrite an equalised float model in the operators of an older opset, for a vendor's compiler that quantises it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Statistics
from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError
from edgeq.graph import roles
from edgeq.graph.edit import checked, constant, readers
from edgeq.graph.linear import sites
from edgeq.passes.apply import apply_to
from edgeq.quantization.qdq import Quantized
from edgeq.quantization.rewrites.vendor import vendor_passes
from edgeq.quantization.walk import Refusal
from edgeq.records import Scheme, VendorSpec

_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}  # Source: onnx 1.23, docs/Versioning.md, the table of releases


def keep_model(model: onnx.ModelProto, observed: Mapping[str, Statistics], scheme: Scheme) -> onnx.ModelProto:
    """Give the equalised float model itself: this kind of scheme rewrites nothing before its compiler quantises."""
    return model


def prepare_for_vendor(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    scheme: Scheme,
    refusals: list[Refusal] | None = None,
    feeds: Sequence[AnyFeeds] = (),
) -> Quantized:
    """Rewrite an equalised float model for a vendor's compiler, and name the weight products that it makes integer.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the sums behind products.
        scheme: whose compiler reads the model.
        refusals: not used: the first operator that the opset lacks is raised.
        feeds: probe batches on which each rewrite is proved in FP32; none where the same was proved before.

    Raises:
        Unsupported: an operator does not exist in the compiler's opset.
        EdgeqError: a rewrite changed the FP32 function.
    """
    if not isinstance(scheme.spec, VendorSpec):
        raise EdgeqError(f"{scheme.name} is no scheme of a vendor's compiler")
    return rewrite_for_vendor(model, observed, scheme.spec, scheme.promoted, feeds)


def rewrite_for_vendor(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    spec: VendorSpec,
    promoted: Collection[str] = (),
    feeds: Sequence[AnyFeeds] = (),
) -> Quantized:
    """Rewrite GatherElements and Gelu, exactly in FP32, and keep one output.

    Where the compiler quantises, scaled tensors come from a LayerNormalization of their own.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the sums behind products.
        spec: what the vendor's compiler reads.
        promoted: products that stay float whatever `spec` says.
        feeds: probe batches on which each rewrite is proved in FP32; none where the same was proved before.

    Returns:
        A float model with `sentence_embedding` as its one output, the names of the products that the compiler is to
        make integer, and those of the weight products that stay float.

    Raises:
        Unsupported: an operator cannot be written in that opset.
        EdgeqError: a rewrite changed the FP32 function.
    """
    with_shapes = checked(ir.from_proto(model))  # of what equalising added
    read = _integer(ir.from_proto(with_shapes).graph, observed, spec) - set(promoted)
    graph_model, _ = apply_to(with_shapes, feeds, vendor_passes(spec), dict(observed), outputs=1)
    graph = graph_model.graph
    _sort_constants(graph, {item.name for item in with_shapes.graph.initializer})
    graph_model.graph.opset_imports[""] = spec.opset
    graph_model.ir_version = _IR_VERSIONS[spec.opset]
    weighted = [str(node.name) for node in graph if node.op_type == "MatMul" and constant(node.inputs[1]) is not None]
    floats = tuple(name for name in weighted if name not in read)
    return Quantized(roles.strip(checked(graph_model)), tuple(name for name in weighted if name in read), floats)


def _integer(graph: ir.Graph, observed: Mapping[str, Statistics], spec: VendorSpec) -> set[str]:
    """Name the MatMul nodes whose output fits int8.

    A product's output has one scale for all channels: where one of them is far larger than the rest, most of them would
    round to a few values. The outlier branch is no token-level product, and stays float, too.
    """
    if spec.dtype != "int8":
        return set()
    found = set()
    for node in (node for site in sites(graph) for node in site.products):
        following = readers(node.outputs[0])
        is_biased = len(following) == 1 and following[0].op_type == "Add"
        seen = observed.get(str((following[0] if is_biased else node).outputs[0].name))
        largest = seen.active_magnitudes if seen is not None else np.ones(1)
        if largest.max() <= spec.output_ratio_max * np.median(largest):
            found.add(str(node.name))
    return found


def _sort_constants(graph: ir.Graph, known: Collection[str]) -> None:
    """Order the constants that rewrites made by their first use: the order of rewrites then changes no byte."""
    used = (value for node in graph for value in node.inputs if value is not None)
    for name in dict.fromkeys(str(value.name) for value in used if constant(value) is not None):
        if name in graph.initializers and name not in known:
            graph.initializers[name] = graph.initializers.pop(name)
